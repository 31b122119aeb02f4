"""Find circuits: the interface of discovery methods, their registry, and the methods themselves."""

# The group of entry points in which other packages offer methods.
ENTRY_POINTS = "circuits.discoverers"
