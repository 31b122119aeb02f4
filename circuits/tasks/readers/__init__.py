"""Readers: what users bring, in files or in memory, as prompt pairs and token ids."""
