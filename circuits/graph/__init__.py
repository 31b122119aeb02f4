"""Nodes, edges, graphs and circuits, as values that know nothing about models."""
