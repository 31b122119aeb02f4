"""The incremental executor: recompute only what an ablated edge changes."""
