"""Attribution graphs in Neuronpedia's graph JSON, which circuit-tracer writes too.

The ids of nodes are `{layer}_{feature}_{position}` for features, `E_{token}_{position}` for
embeddings and `{n_layers + 1}_{token}_{position}` for targets. An error is written as
`{layer}_-1_{position}`, because the older `0_{layer}_{position}` also names a feature of layer 0.
"""

from circuits.formats.neuronpedia.load import ImportedGraph, load_neuronpedia
from circuits.formats.neuronpedia.save import save_neuronpedia

__all__ = ["ImportedGraph", "load_neuronpedia", "save_neuronpedia"]
