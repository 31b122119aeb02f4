"""Transcoders: what they are, how features are extracted with them, how they are trained, and their files."""
