"""A circuit as a layered SVG drawing."""
