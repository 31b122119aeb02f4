"""What matters in a circuit, against paths found by networkx."""

import networkx as nx
import numpy as np
import pytest
import torch
from architectures import random_model

import circuits
from circuits.running.edge_layout import EdgeLayout
from circuits.running.incremental.plan import Needs, target_blocks

LOGITS = "logits"


@pytest.mark.parametrize("kept_share", [0.05, 0.15, 0.4, 1.0])
@pytest.mark.parametrize("architecture", ["gpt2", "pythia", "attention_only"])
def test_a_source_matters_if_it_reaches_the_logits_and_everywhere_if_keys_or_values_carry_it(
    architecture, kept_share
):
    model = random_model(architecture, n_layers=3)
    layout = EdgeLayout.of(model, circuits.component_graph(model))
    possible, blocks = layout.possible(model).numpy(), target_blocks(layout)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        kept = possible & (torch.rand(possible.shape, generator=generator) < kept_share).numpy()
        needs = Needs.of(blocks, kept)
        # A path remembers whether attention carried it to another token.
        paths = nx.DiGraph()
        paths.add_nodes_from([(LOGITS, False), (LOGITS, True)])
        for block in blocks:
            for row, source in np.argwhere(kept[block.rows]).tolist():
                reader = LOGITS if block is blocks[-1] else block.sources.start + row
                for moved in (False, True):
                    paths.add_edge((source, moved), (reader, moved or block.slot in ("k", "v")))
        carried = nx.ancestors(paths, (LOGITS, True))
        reaching = carried | nx.ancestors(paths, (LOGITS, False))
        sources = range(len(layout.nodes))
        assert needs.live[:-1].tolist() == [(source, False) in reaching for source in sources]
        assert needs.everywhere[:-1].tolist() == [(source, False) in carried for source in sources]
