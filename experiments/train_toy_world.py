"""Train toy-world and write circuits/assets/toy-world: tokenizer, configuration and weights.

    python experiments/train_toy_world.py                      # about 30 minutes on two CPU cores
    python experiments/train_toy_world.py --steps 50 --out /elsewhere

An interrupted run resumes from its last checkpoint if it is started with the same settings. The
model card says what to expect at the end.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from toy_world_text import Chunk, chunks, induction_first, make_tokenizer
from transformers import PreTrainedTokenizerFast

import circuits
from circuits.system.files import read_tensors, write_tensors

FORMAT, FORMAT_VERSION = "circuits.training", 1


@dataclass(frozen=True)
class Config:
    """Settings of the training run."""

    out: Path = Path("circuits/assets/toy-world")
    """Output folder of the model."""
    checkpoint: Path = Path("runs/toy-world.safetensors")
    """Folder of the checkpoint."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    steps: int = 2400
    """Steps on all text."""
    refining_steps: int = 900
    """Refining steps. Every second batch holds short sequences that begin with an induction prompt.

    The model learns to attend to the previous token position by position, and learns some positions
    that the task needs late.
    """
    batch: int = 96
    """Sequences in a step: 96 * 64 = 6,144 tokens."""
    length: int = 64
    """Tokens in a sequence, and the model's context length."""
    peak: float = 2e-3
    """Peak of the one-cycle learning rate."""
    refining_peak: float = 1.5e-3
    """Peak learning rate of the refining steps."""
    weight_decay: float = 0.1
    background: float = 0.02
    """Loss weight of tokens that the text before them does not predict; predictable tokens have
    weight 1.
    """
    seed: int = 0
    device: str = "cpu"
    threads: int = 2
    """CPU threads."""


SHAPE = {
    "n_layers": 4,
    "n_heads": 4,
    "d_model": 128,
    "d_head": 32,
    "d_mlp": 512,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
}


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    tokenizer = make_tokenizer()
    settings = {
        **SHAPE,
        "n_ctx": config.length,
        "d_vocab": len(tokenizer),
        "model_name": "toy-world",
        "default_prepend_bos": True,
    }
    model = circuits.build_model(
        settings, initial_weights(settings, config.seed), device=config.device
    )
    train(model, tokenizer, config)
    # Half the size, and what is measured in the tests is what ships.
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    circuits.save_model(
        circuits.build_model(settings, weights, device="cpu", dtype=torch.bfloat16), config.out
    )
    tokenizer.save_pretrained(config.out)


def initial_weights(settings: dict, seed: int) -> dict[str, Tensor]:
    """Normal weights scaled to keep the residual stream's size, zero biases and unit norms."""
    d_model, heads, d_head, d_mlp = (
        settings[name] for name in ("d_model", "n_heads", "d_head", "d_mlp")
    )
    shapes = {
        "embed.W_E": (settings["d_vocab"], d_model),
        "pos_embed.W_pos": (settings["n_ctx"], d_model),
    }
    for layer in range(settings["n_layers"]):
        block = {"ln1.w": (d_model,), "ln1.b": (d_model,), "ln2.w": (d_model,), "ln2.b": (d_model,)}
        block |= {f"attn.W_{slot}": (heads, d_model, d_head) for slot in "QKV"} | {
            "attn.W_O": (heads, d_head, d_model)
        }
        block |= {f"attn.b_{slot}": (heads, d_head) for slot in "QKV"} | {"attn.b_O": (d_model,)}
        block |= {
            "mlp.W_in": (d_model, d_mlp),
            "mlp.b_in": (d_mlp,),
            "mlp.W_out": (d_mlp, d_model),
            "mlp.b_out": (d_model,),
        }
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {
        "ln_final.w": (d_model,),
        "ln_final.b": (d_model,),
        "unembed.W_U": (d_model, settings["d_vocab"]),
    }
    shapes |= {"unembed.b_U": (settings["d_vocab"],)}
    generator = torch.Generator().manual_seed(seed)
    reads = 0.8 / math.sqrt(d_model)
    writes = reads / math.sqrt(2 * settings["n_layers"])
    weights = {}
    for name, shape in shapes.items():
        size = writes if name.endswith(("W_O", "W_out")) else reads if "W_" in name else 0.0
        weights[name] = torch.randn(shape, generator=generator) * size + (
            1.0 if name.endswith(".w") else 0.0
        )
    return weights


def train(model: circuits.models.Model, tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Train in place."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.peak, betas=(0.9, 0.98))
    start = restore(model, optimizer, config)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        total = config.steps + config.refining_steps
        bar = progress.add_task("train", total=total, completed=start, rate="")
        for step in range(start, total):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            tokens, weights = (
                part.to(config.device) for part in make_batch(tokenizer, config, step)
            )
            loss = weighted_loss(model(tokens), tokens, weights)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            speed = progress.tasks[bar].speed
            progress.update(
                bar, advance=1, rate=f"loss {loss.item():.3f}, {speed or 0:.1f} steps/s"
            )
            if (step + 1) % config.checkpoint_every == 0:
                save(model, optimizer, config, step + 1)
                progress.console.print(f"step {step + 1}: loss {loss.item():.4f}")


def learning_rate(step: int, config: Config) -> float:
    """Two cycles: all text, then refining."""
    if step < config.steps:
        return config.peak * one_cycle(step / config.steps)
    return config.refining_peak * one_cycle((step - config.steps) / config.refining_steps)


def one_cycle(done: float) -> float:
    """The learning rate as a share of its peak: linear warm-up for a tenth, then cosine decay to
    zero.
    """
    return done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))


def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of the next token, averaged with the predicted tokens' `weights`."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def make_batch(
    tokenizer: PreTrainedTokenizerFast, config: Config, step: int
) -> tuple[Tensor, Tensor]:
    """Sequences of <bos> and chunks of text, cut at the context length.

    Drawn from the step number, so that resuming needs no other state.
    """
    random = Random(f"toy-world-{config.seed}-{step}")
    # Twice as many sequences of half the length are as much work.
    short = step >= config.steps and step % 2 == 0
    batch, length = (
        (2 * config.batch, config.length // 2) if short else (config.batch, config.length)
    )
    texts: list[list[Chunk]] = [
        (induction_first if short else chunks)(random, length) for _ in range(batch)
    ]
    tokens = torch.full((batch, length), tokenizer.bos_token_id)
    weights = torch.full((batch, length), config.background)
    for row, sequence in enumerate(texts):
        position = 1
        for chunk in sequence:
            ids = tokenizer.convert_tokens_to_ids(chunk.words)[: length - position]
            tokens[row, position : position + len(ids)] = torch.tensor(ids)
            for index in chunk.predictable:
                if position + index < length:
                    weights[row, position + index] = 1.0
            position += len(ids)
    return tokens, weights


def save(
    model: circuits.models.Model, optimizer: torch.optim.Optimizer, config: Config, step: int
) -> None:
    """Save parameters, moments and step."""
    state = {f"parameter.{name}": parameter for name, parameter in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    write_tensors(
        config.checkpoint,
        state,
        {"step": str(step), "config": settings_key(config)},
        FORMAT,
        FORMAT_VERSION,
    )


def restore(model: circuits.models.Model, optimizer: torch.optim.Optimizer, config: Config) -> int:
    """Load a checkpoint of the same settings; returns the next step."""
    if not config.checkpoint.exists():
        return 0
    state, metadata = read_tensors(config.checkpoint, FORMAT, FORMAT_VERSION)
    if metadata["config"] != settings_key(config):
        raise circuits.InputError(
            f"{config.checkpoint} was written with other settings; delete it or give another "
            f"--checkpoint."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"parameter.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(metadata["step"])


def settings_key(config: Config) -> str:
    """The settings that the training state depends on."""
    ignored = ("out", "checkpoint", "checkpoint_every", "device", "threads")
    return str({name: value for name, value in asdict(config).items() if name not in ignored})


if __name__ == "__main__":
    main(tyro.cli(Config))
