"""Edge scores of auto-circuit; eap_peers.py runs this in auto-circuit's environment.

A line on standard input starts a repetition. The scores are the gradient of minus the mean logit
difference at masks of zero; a mask of one carries the corrupted output.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.utils.graph_utils import patchable_model
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

torch.set_num_threads(1)
folder, answer = Path(sys.argv[1]), Path(sys.argv[2])
case = json.loads((folder / "case.json").read_text())
model = HookedTransformer(
    HookedTransformerConfig(**case["config"], device="cpu", init_weights=False, seed=0)
)
model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
model.cfg.use_attn_result = model.cfg.use_split_qkv_input = model.cfg.use_hook_mlp_in = True
model.eval().requires_grad_(False)
clean, corrupted, right, wrong = (
    torch.tensor(case[name]) for name in ("clean", "corrupted", "answers", "wrong_answers")
)
loader = PromptDataLoader(
    PromptDataset(clean, corrupted, list(right), list(wrong)),
    seq_len=clean.shape[1],
    diverge_idx=0,
    batch_size=len(clean),
    shuffle=False,
)
patchable = patchable_model(
    model, factorized=True, slice_output="last_seq", separate_qkv=True, device=torch.device("cpu")
)


def name(label):
    """The edge's name in circuits; theirs are `A0.1`, `A0.1.Q`, `MLP 0`, `Resid Start`, `Resid
    End`.
    """
    if label.startswith("A"):
        layer, head, *slot = label[1:].split(".")
        return ".".join([f"a{layer}", f"h{head}", *(part.lower() for part in slot)])
    return {"Resid Start": "embed", "Resid End": "logits"}.get(label, label.replace("MLP ", "m"))


for line in sys.stdin:
    if line.strip() != "again":
        break
    patchable.zero_grad()
    start = time.perf_counter()
    scores = mask_gradient_prune_scores(
        patchable, loader, None, grad_function="logit", answer_function="avg_diff", mask_val=0.0
    )
    seconds = time.perf_counter() - start
    edges = {
        f"{name(edge.src.name)}->{name(edge.dest.name)}": float(
            scores[edge.dest.module_name][edge.patch_idx]
        )
        for edge in patchable.edges
    }
    versions = {
        package: version(package) for package in ("auto-circuit", "transformer-lens", "torch")
    }
    answer.write_text(json.dumps({"scores": edges, "versions": versions}))
    print("seconds", seconds, flush=True)
