"""Prompt pairs with answers, the families that write them, and the metrics that judge logits on them."""
