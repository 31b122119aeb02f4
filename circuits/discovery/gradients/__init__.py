"""Edge scores from gradients: the passes, the products with source differences, and their sums."""
