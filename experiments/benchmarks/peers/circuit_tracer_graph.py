"""Attribution graphs of circuit-tracer 0.5.0; attribution_graph.py runs this in its environment.

A line on standard input starts a repetition.
"""

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)
folder, answer, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
case = json.loads((folder / "case.json").read_text())


def tokenizer(vocabulary):
    """A tokenizer, which circuit-tracer requires; <bos> is 1, as in the given tokens."""
    words = {f"w{number}": number for number in range(vocabulary)}
    words = {("<bos>" if number == 1 else word): number for word, number in words.items()}
    special = {
        "bos_token": "<bos>",
        "eos_token": "<bos>",
        "pad_token": "<bos>",
        "name_or_path": "words",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<bos>")),
        add_bos_token=True,
        **special,
    )


# In memory, so that nothing is read from the disk while it runs.
transcoders = load_clt(
    str(folder / "clt"), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False
)
config = HookedTransformerConfig(**case["config"], device="cpu", init_weights=False)
model = TransformerLensReplacementModel.from_config(
    config, transcoders, tokenizer=tokenizer(case["config"]["d_vocab"])
)
# The replacement model has wrapped its MLPs and its unembedding.
weights = {
    name.replace(".mlp.", ".mlp.old_mlp."): tensor
    for name, tensor in load_file(folder / "model.safetensors").items()
}
weights = {
    name.replace("unembed.", "unembed.old_unembed."): tensor for name, tensor in weights.items()
}
missing = model.load_state_dict(weights, strict=False)
assert not missing.unexpected_keys and not [
    name for name in missing.missing_keys if name.startswith("blocks") and "W_" in name
], missing
tokens = torch.tensor(case["tokens"])

for line in sys.stdin:
    if line.strip() != "again":
        break
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    graph = attribute(tokens, model, batch_size=batch)
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    took["peak_above_loaded_bytes"] = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ) * 1024
    save_file(
        {
            "adjacency": graph.adjacency_matrix.contiguous(),
            "features": graph.active_features.contiguous(),
        },
        answer.with_suffix(".safetensors"),
    )
    answer.write_text(
        json.dumps(
            {
                "versions": {
                    name: version(name) for name in ("circuit-tracer", "transformer-lens", "torch")
                }
            }
        )
    )
    print("took", json.dumps(took), flush=True)
