"""What the words of a command ask for: help and mistakes are answered without importing torch."""
