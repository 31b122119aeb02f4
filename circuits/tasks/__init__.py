"""Prompt pairs with answers, the families that draw them, and the metrics that score logits."""
