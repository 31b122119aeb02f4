"""Run a model with everything outside a circuit ablated, and measure the damage."""
