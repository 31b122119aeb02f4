"""Names and limits in Neuronpedia's graph files, shared by export and import."""

from __future__ import annotations

import re

from circuits.attribution.feature_graph import EMBEDDING, ERROR, FEATURE, TARGET

SCHEMA_VERSION = 1

TYPE_OF_KIND = {
    FEATURE: "cross layer transcoder",
    ERROR: "mlp reconstruction error",
    EMBEDDING: "embedding",
    TARGET: "logit",
}
"""The files' types of nodes. Features of per-layer transcoders have the first type, too."""

FIRST_CUSTOM = 1_000_000_000
"""Targets that are not tokens are numbered from here on, beyond any vocabulary."""

SETTINGS = {
    "most_logits": "max_n_logits",
    "probability": "desired_logit_prob",
    "budget": "max_feature_nodes",
    "at_a_time": "at_a_time",
}
"""Settings of `AttributionGraph` and their names in the files."""

_OUTPUT = re.compile(r'Output "(?P<label>.*)" \(p=[^)]*\)', re.DOTALL)


def output_text(label: str, probability: float) -> str:
    """The text that the pages show for a target."""
    return f'Output "{label}" (p={probability:.3f})'


def output_label(text: str) -> str:
    """The label in a text of `output_text`; any other text as it is."""
    match = _OUTPUT.fullmatch(text)
    return match["label"] if match else text
