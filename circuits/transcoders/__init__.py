"""Transcoders: sparse features that read what an MLP reads and write what it writes; per layer, with a skip, or across layers."""
