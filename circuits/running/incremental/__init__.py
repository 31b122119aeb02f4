"""Run circuits by recomputing only what an ablated edge changes; read `executor` first."""
