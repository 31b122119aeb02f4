"""Find circuits: the interface of discovery methods, their registry, and the methods themselves."""
