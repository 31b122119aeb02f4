"""Noise on token embeddings, as in causal tracing.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT"
(https://arxiv.org/abs/2202.05262), whose noise has 3 standard deviations on the subject's tokens.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.models import Model, shape_of, weights_of
from circuits.system.errors import InputError
from circuits.system.messages import suggestion
from circuits.tasks.task import Task

Noise = Float[Tensor, "batch pos d_model"]
Tokens = Int[Tensor, " pos"]


def embedding_noise(
    model: Model, task: Task, scale: float, seed: int = 0, span: str | None = None
) -> Noise:
    """Gaussian noise for the clean prompts; zero outside of the span, or of the prompts as given.

    Its standard deviation is `scale` times that of all entries of W_E, as they are written.
    """
    if span is not None and span not in task.positions:
        raise InputError(
            f"task {task.name!r} has no span {span!r} to put noise on: "
            f"{suggestion(span, task.positions)}"
        )
    noised = task.prompt_mask if span is None else task.positions[span]
    cfg = shape_of(model)
    noise = torch.zeros(*noised.shape, cfg.d_model)
    lengths = task.lengths.tolist()
    for tokens, row, length in zip(task.clean, noise, lengths, strict=True):
        row[:length] = _normal(tokens[:length], cfg.d_model, seed)
    deviation = scale * weights_of(model).embedding_deviation()
    weights = noised.cpu()[..., None]
    scaled = noise * weights * deviation
    return scaled.to(cfg.device, cfg.dtype)


def _normal(tokens: Tokens, width: int, seed: int) -> Tensor:
    """Standard normal numbers, the same wherever these tokens are a prompt."""
    ids = tokens.cpu().numpy().tobytes()
    named = f"{seed} ".encode() + ids
    digest = blake2b(named, digest_size=8).digest()
    # Drawn on the CPU, whose generator gives the same numbers on every machine; 63 bits fit it.
    own_seed = int.from_bytes(digest, "little") >> 1
    generator = torch.Generator().manual_seed(own_seed)
    return torch.randn(len(tokens), width, generator=generator)
