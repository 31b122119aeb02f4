"""Tables in markdown."""

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """A markdown table; numbers are whole or have three digits, missing ones are empty."""
    lines = [
        list(table.columns),
        ["---"] * len(table.columns),
        *([cell(value) for value in row] for row in table.itertuples(index=False)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(value: object) -> str:
    """One cell."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return "" if value != value else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
