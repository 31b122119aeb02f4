"""Tables for files that are read."""

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """The table, numbers to three digits or whole; cells without one are empty."""
    lines = [
        list(table.columns),
        ["---"] * len(table.columns),
        *([cell(value) for value in row] for row in table.itertuples(index=False)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(value: object) -> str:
    """One of its cells."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return "" if value != value else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
