"""The interactive page of an attribution graph, and the local server for large graphs."""
