"""Edge scores of transformer-lens 4; eap_peers.py runs this in its environment.

A line on standard input starts a repetition. The scores are (clean - corrupted) . d metric / d
input at the corrupted run, averaged over prompts, for each position.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)
from transformers import GPT2Config, GPT2LMHeadModel

torch.set_num_threads(1)
folder, answer = Path(sys.argv[1]), Path(sys.argv[2])
case = json.loads((folder / "case.json").read_text())


def as_gpt2(weights, shape):
    """The weights as a Hugging Face GPT-2; the bridge's own model lacks what edge scores need."""
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=shape["n_layers"],
            n_head=shape["n_heads"],
            n_embd=shape["d_model"],
            n_inner=shape["d_mlp"],
            n_positions=shape["n_ctx"],
            vocab_size=shape["d_vocab"],
            activation_function=shape["act_fn"],
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    named = {
        "transformer.wte.weight": weights["embed.W_E"],
        "transformer.wpe.weight": weights["pos_embed.W_pos"],
        "transformer.ln_f.weight": weights["ln_final.w"],
        "transformer.ln_f.bias": weights["ln_final.b"],
        "lm_head.weight": weights["unembed.W_U"].T,
    }
    for layer in range(shape["n_layers"]):
        theirs, ours = f"transformer.h.{layer}.", f"blocks.{layer}."
        for norm in (1, 2):
            named |= {
                f"{theirs}ln_{norm}.weight": weights[f"{ours}ln{norm}.w"],
                f"{theirs}ln_{norm}.bias": weights[f"{ours}ln{norm}.b"],
            }
        slots = [weights[f"{ours}attn.W_{slot}"].transpose(0, 1).flatten(1) for slot in "QKV"]
        named |= {
            f"{theirs}attn.c_attn.weight": torch.cat(slots, dim=1),
            f"{theirs}attn.c_attn.bias": torch.cat(
                [weights[f"{ours}attn.b_{slot}"].flatten() for slot in "QKV"]
            ),
            f"{theirs}attn.c_proj.weight": weights[f"{ours}attn.W_O"].flatten(0, 1),
            f"{theirs}attn.c_proj.bias": weights[f"{ours}attn.b_O"],
            f"{theirs}mlp.c_fc.weight": weights[f"{ours}mlp.W_in"],
            f"{theirs}mlp.c_fc.bias": weights[f"{ours}mlp.b_in"],
            f"{theirs}mlp.c_proj.weight": weights[f"{ours}mlp.W_out"],
            f"{theirs}mlp.c_proj.bias": weights[f"{ours}mlp.b_out"],
        }
    model.load_state_dict(named, strict=False)
    return model


source = as_gpt2(load_file(folder / "model.safetensors"), case["config"])
source.save_pretrained(folder / "gpt2")
model = TransformerBridge.boot_transformers(
    str(folder / "gpt2"), hf_model=source, device="cpu", dtype=torch.float32
)
# With frozen weights there would be nothing for its gradients to start from.
model.eval()
clean, corrupted, right, wrong = (
    torch.tensor(case[name]) for name in ("clean", "corrupted", "answers", "wrong_answers")
)


def scores():
    """Score prompt by prompt, because the metric only sees the logits."""
    total = {}
    for index in range(len(clean)):

        def damage(logits):
            last = logits[0, -1]
            return last[wrong[index, 0]] - last[right[index, 0]]  # noqa: B023

        pair = (clean[index : index + 1], corrupted[index : index + 1])
        found = attribution_patch(
            model, *pair, damage, EdgeAttributionConfig(granularity="edge")
        ).edge_scores
        for (source, target), score in found.items():
            edge = f"{name(source)}->{name(target)}"
            total[edge] = total.get(edge, 0.0) + score / len(clean)
    return total


def name(node):
    """The edge's name in circuits."""
    return {
        "embed": "embed",
        "attn_head_out": f"a{node.layer}.h{node.head}",
        "mlp_out": f"m{node.layer}",
        "mlp_in": f"m{node.layer}",
        "logits": "logits",
    }.get(node.kind, f"a{node.layer}.h{node.head}.{node.kind[0]}")


for line in sys.stdin:
    if line.strip() != "again":
        break
    start = time.perf_counter()
    result = scores()
    seconds = time.perf_counter() - start
    versions = {package: version(package) for package in ("transformer-lens", "torch")}
    answer.write_text(json.dumps({"scores": result, "versions": versions}))
    print("seconds", seconds, flush=True)
