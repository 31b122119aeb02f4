"""Layouts, templates and pages behind `circuits.plot`. Nothing here requests anything over a network."""
