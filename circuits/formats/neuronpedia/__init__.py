"""Neuronpedia's graph JSON, which circuit-tracer writes too: export and import of attribution graphs.

There, nodes are called `{layer}_{feature}_{position}`, `E_{token}_{position}` (embeddings) and `{layers + 1}_{token}_{position}` (targets). Errors
are `{layer}_-1_{position}`, because the older `0_{layer}_{position}` is also the name of a feature of layer 0.
"""

from circuits.formats.neuronpedia.load import ImportedGraph, load_neuronpedia
from circuits.formats.neuronpedia.save import save_neuronpedia

__all__ = ["ImportedGraph", "load_neuronpedia", "save_neuronpedia"]
