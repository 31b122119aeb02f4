"""Models of the class HookedTransformer, of TransformerLens 3."""
