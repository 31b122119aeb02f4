"""Hand-wired models whose circuits are known by construction, with tasks to find them on."""
