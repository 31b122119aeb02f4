"""Train transcoders of all three kinds and measure how good they are."""
