"""Colours and fonts that drawings and figures share."""

PAPER, INK, QUIET, BAND = "#ffffff", "#1f2430", "#5c6370", "#f5f6f8"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
PALETTE = (BLUE, VERMILION, GREEN, "#cc79a7", "#8a6d00", "#56b4e9")
