"""Drawings, figures and self-contained HTML pages."""
