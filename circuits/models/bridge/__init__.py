"""Models of the class TransformerBridge, which wraps a model of Hugging Face's transformers."""
