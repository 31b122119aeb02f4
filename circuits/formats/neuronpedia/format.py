"""Words and limits of Neuronpedia's graph files."""

from __future__ import annotations

import re

import torch

from circuits.attribution.feature_graph import EMBEDDING, ERROR, FEATURE, TARGET

SCHEMA_VERSION = 1
TYPES = {
    "cross layer transcoder": FEATURE,
    "mlp reconstruction error": ERROR,
    "embedding": EMBEDDING,
    "logit": TARGET,
}
"""Their types of nodes. Features of per-layer transcoders have the first name, too."""

TYPE_NAMES = {kind: name for name, kind in TYPES.items()}

FIRST_CUSTOM = 1_000_000_000
"""Targets that are no token have ids from here on, beyond any vocabulary."""

MOST_LAYERS = 10_000
LARGEST_WEIGHT = torch.finfo(torch.float32).max
UNKNOWN_TOKEN = -1
SETTINGS = {
    "most_logits": "max_n_logits",
    "probability": "desired_logit_prob",
    "budget": "max_feature_nodes",
    "at_a_time": "at_a_time",
}
"""Settings of `AttributionGraph`, and what they are called there."""

OUTPUT = re.compile(r'Output "(?P<label>.*)" \(p=[^)]*\)', re.DOTALL)
NODE_ID = re.compile("(?P<layer>E|L|[0-9]{1,9})_(?P<index>[0-9]{1,15})_(?P<position>[0-9]{1,9})")
LARGEST_INDEX = 10**15 - 1
SHOWN = 60
