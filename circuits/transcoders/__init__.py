"""Transcoders, feature extraction, training, and reading and writing transcoder files."""
