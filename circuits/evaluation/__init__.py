"""Judge circuits: faithfulness, recovery of known circuits, and comparisons between methods."""
