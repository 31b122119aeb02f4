"""Training transcoders on any model: per layer, per layer with a skip, and cross-layer.

What features read and what MLPs write is recorded in one run of the model per batch, and the transcoders of all layers learn at once to make
the second from the first through few features. Of a batch, the k times its tokens features that write most fire (BatchTopK, Bussmann, Leask
and Nanda 2024, https://arxiv.org/abs/2412.06410), or any number at a price (L1, or tanh as in Ameisen et al. 2025,
https://transformer-circuits.pub/2025/attribution-graphs/methods.html). Features that no longer fire learn from what the others leave (AuxK,
Gao et al. 2024, https://arxiv.org/abs/2406.04093). After training a layer's features fire where they write more than the least that did in a
batch, on average: a JumpReLU, by which what fires at a token does not depend on other tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models import Model
from circuits.models.identity import checksum, identity
from circuits.system.errors import InputError
from circuits.system.files import read_tensors, write_tensors
from circuits.transcoders.training.parameters import Units, Weights
from circuits.transcoders.training.quality import quality, record
from circuits.transcoders.transcoder import Reads, Transcoders, Writes

__all__ = ["Batches", "Kind", "Progress", "Training", "quality", "record", "train"]

FORMAT, FORMAT_VERSION = "circuits.transcoder_training", 1

Kind = Literal["plt", "skip-plt", "clt"]
Batches = Callable[[int], tuple[Tensor, Tensor]]
"""Gives the tokens [batch, pos] of a step and which are real; the same for the same step, so that resuming needs no more state."""
Progress = Callable[[int, float], None]
"""Called with how many steps are done and the loss."""

CALIBRATION_BATCHES = 16
TANH_SCALE = 10
AUXILIARY_FEATURES, AUXILIARY_WEIGHT = 64, 0.2


@dataclass(frozen=True)
class Training:
    """How transcoders are trained."""

    kind: Kind = "plt"
    """Per layer (reading what the MLP reads, after its norm), the same with a linear skip, or cross-layer (reading the residual stream)."""
    n_features: int = 512
    """Features in each layer."""
    sparsity: Literal["batch_topk", "l1", "tanh"] = "batch_topk"
    """The k most important features of each token, on average over a batch; or a price on activations."""
    k: tuple[float, ...] = (16,)
    """How many features fire at a token, on average: one number, or one for each layer."""
    penalty: tuple[float, ...] = (0.01,)
    """The price of l1 and tanh, likewise."""
    steps: int = 4000
    learning_rate: float = 4e-3
    """At its highest, for Adam; it rises over the first twentieth of the steps and falls to zero over the last half."""
    dead_after: int = 15_000
    """A feature that has not fired for so many tokens is dead, and learns from what the others leave."""
    seed: int = 0
    """Of the first weights."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of training."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""

    @property
    def reads(self) -> Reads:
        """What features read."""
        return "residual" if self.kind == "clt" else "mlp_input"

    @property
    def writes(self) -> Writes:
        """Where they write."""
        return "residual" if self.kind == "clt" else "mlp"


def train(
    model: Model,
    batches: Batches,
    config: Training,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Transcoders:
    """Train transcoders of every layer. The model, its flags and the state of all random generators stay as they were.

    Args:
        batches: the training text. The first position of each prompt is not learned from.
        checkpoint: a file that keeps the state of training, from which it goes on when it was interrupted, with the same result.

    Raises:
        InputError: the settings do not fit the model, a batch has no tokens, or the checkpoint was written with other settings.
    """
    _check(model, config)
    first = batches(0)
    units, key = Units.of(*_recorded(model, config, first)), _key(model, config, first[0])
    state = _State.first(config, model)
    path = None if checkpoint is None else Path(checkpoint)
    start = 0 if path is None or not path.exists() else state.restore(path, key)
    for step in range(start, config.steps):
        inputs, outputs = units.normalized(*_recorded(model, config, batches(step)))
        loss = _learn(state, config, inputs, outputs, _schedule((step + 1) / config.steps))
        if path is not None and (
            (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
        ):
            state.save(path, key, step + 1)
        if progress is not None:
            progress(step + 1, loss)
    thresholds = (
        _thresholds(model, batches, config, state.weights, units)
        if config.sparsity == "batch_topk"
        else None
    )
    name = f"{model.cfg.model_name}-{config.kind}"
    return state.weights.transcoders(units, thresholds, config.reads, config.writes, name)


def _recorded(
    model: Model, config: Training, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    inputs, outputs = record(model, config.reads, config.writes, *batch)
    dtype = getattr(torch, config.dtype)
    return inputs.to(dtype), outputs.to(dtype)


def _check(model: Model, config: Training) -> None:
    cfg = model.cfg
    if cfg.attn_only:
        raise InputError(
            f"{cfg.model_name} has no MLPs, so there is nothing for transcoders to learn."
        )
    if config.kind not in ("plt", "skip-plt", "clt") or config.sparsity not in (
        "batch_topk",
        "l1",
        "tanh",
    ):
        raise InputError(
            f"kind {config.kind!r} with sparsity {config.sparsity!r}; use plt, skip-plt or clt, and batch_topk, l1 or tanh."
        )
    for name, values in (("k", config.k), ("penalty", config.penalty)):
        if len(values) not in (1, cfg.n_layers) or min(values) <= 0:
            raise InputError(
                f"{name}={values}: give one positive number, or one for each of the {cfg.n_layers} layers."
            )
    if (
        min(config.n_features, config.steps, config.checkpoint_every) < 1
        or max(config.k) > config.n_features
    ):
        raise InputError(
            f"n_features={config.n_features}, k={config.k}, steps={config.steps}: all must be positive, and k at most n_features."
        )


@dataclass(frozen=True, eq=False)
class _State:
    """All that changes in training.

    Attributes:
        silent: the number of tokens since a feature last fired.
    """

    weights: Weights
    optimizer: torch.optim.Adam
    silent: Int[Tensor, "layer feature"]

    @staticmethod
    def first(config: Training, model: Model) -> _State:
        """Before the first step."""
        cfg = model.cfg
        weights = Weights.first(
            cfg.n_layers,
            config.n_features,
            cfg.d_model,
            across=config.kind == "clt",
            skip=config.kind == "skip-plt",
            seed=config.seed,
            dtype=getattr(torch, config.dtype),
            device=cfg.device,
        )
        optimizer = torch.optim.Adam(weights.tensors(), lr=config.learning_rate, betas=(0.9, 0.99))
        return _State(
            weights,
            optimizer,
            torch.zeros(cfg.n_layers, config.n_features, dtype=torch.int64, device=cfg.device),
        )

    def save(self, path: Path, key: str, step: int) -> None:
        """Keep it for `restore`."""
        tensors = {
            f"weight.{index}": tensor for index, tensor in enumerate(self.weights.tensors())
        } | {"silent": self.silent}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        write_tensors(path, tensors, {"step": str(step), "settings": key}, FORMAT, FORMAT_VERSION)

    @torch.no_grad()
    def restore(self, path: Path, key: str) -> int:
        """Take up a checkpoint of the same settings, and say which step comes next."""
        tensors, metadata = read_tensors(path, FORMAT, FORMAT_VERSION)
        if metadata["settings"] != key:
            raise InputError(
                f"{path} was written with other settings, model or text; delete it or give another checkpoint."
            )
        self.silent.copy_(tensors["silent"])
        moments: dict[int, dict[str, Tensor]] = {}
        for index, tensor in enumerate(self.weights.tensors()):
            tensor.copy_(tensors[f"weight.{index}"])
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, place, moment = name.split(".")
                moments.setdefault(int(place), {})[moment] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        return int(metadata["step"])


def _learn(state: _State, config: Training, inputs: Tensor, outputs: Tensor, rate: float) -> float:
    """One step at a share of the learning rate; the loss before it."""
    weights = state.weights
    state.optimizer.param_groups[0]["lr"] = config.learning_rate * rate
    with torch.enable_grad():
        loss = _loss(weights, config, inputs, outputs, state.silent)
        state.optimizer.zero_grad()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(weights.tensors(), 1.0)
    state.optimizer.step()
    return loss.item()


def _loss(
    weights: Weights,
    config: Training,
    inputs: Float[Tensor, "layer token d_model"],
    outputs: Float[Tensor, "layer token d_model"],
    silent: Int[Tensor, "layer feature"],
) -> Float[Tensor, ""]:
    """Unexplained variance, summed over layers, with the price of sparsity and what dead features miss; counts how long features are silent."""
    pre = weights.preactivations(inputs)
    with torch.no_grad():
        written = pre * weights.lengths()
        fires = written > (
            0 if config.sparsity != "batch_topk" else _least(written, config.k)[:, None, None]
        )
    activations = torch.where(fires, pre, 0)
    missed = outputs - weights.reconstruct(inputs, activations)
    spread = (outputs - outputs.mean(1, keepdim=True)).square().sum((1, 2))
    loss = (missed.square().sum((1, 2)) / spread).sum()
    if config.sparsity != "batch_topk":
        written = activations * weights.lengths()
        price = written if config.sparsity == "l1" else (TANH_SCALE * written).tanh()
        loss = loss + (inputs.new_tensor(config.penalty) * price.sum(2).mean(1)).sum()
    silent.add_(inputs.shape[1]).masked_fill_(fires.any(1), 0)
    return loss + AUXILIARY_WEIGHT * auxiliary_loss(
        weights, inputs, missed.detach(), silent > config.dead_after
    )


def auxiliary_loss(
    weights: Weights, inputs: Tensor, missed: Tensor, dead: Bool[Tensor, "layer feature"]
) -> Float[Tensor, ""]:
    """How much of what was missed the dead features would leave, were those of them to fire that come closest to it."""
    if not dead.any():
        return inputs.new_zeros(())
    pre = weights.preactivations(inputs).masked_fill(~dead[:, None], -torch.inf)
    values, features = pre.topk(min(AUXILIARY_FEATURES, pre.shape[2]), dim=2)
    made = weights.decode(
        torch.zeros_like(pre).scatter(
            2, features, values.masked_fill(values == -torch.inf, 0).relu()
        )
    )
    left = (missed - made).square().sum((1, 2)) / missed.square().sum((1, 2)).clamp(min=1e-12)
    return left[dead.any(1)].sum()


def _least(
    written: Float[Tensor, "layer token feature"], k: Sequence[float]
) -> Float[Tensor, " layer"]:
    """By layer, the least of the k times tokens largest."""
    result = []
    for layer, one in enumerate(written):
        n = max(1, round(k[layer if len(k) > 1 else 0] * len(one)))
        result.append(one.flatten().topk(n, sorted=False).values.min())
    # Those that fire lie strictly above, as with a JumpReLU, so one fewer fires than n.
    return torch.stack(result).clamp(min=0)


@torch.no_grad()
def _thresholds(
    model: Model, batches: Batches, config: Training, weights: Weights, units: Units
) -> Float[Tensor, " layer"]:
    """By layer, the least that a feature writes which fires, on average over some batches that training has not seen."""
    total = torch.zeros(
        len(weights.decoders), dtype=weights.encoder.dtype, device=weights.encoder.device
    )
    for step in range(config.steps, config.steps + CALIBRATION_BATCHES):
        inputs = units.normalized(*_recorded(model, config, batches(step)))[0]
        pre = weights.preactivations(inputs)
        total += _least(pre * weights.lengths(), config.k)
    return total / CALIBRATION_BATCHES


def _schedule(done: float) -> float:
    """The learning rate's share of its peak."""
    return min(1.0, done / 0.05, (1 - done) / 0.5)


def _key(model: Model, config: Training, tokens: Tensor) -> str:
    """What the state of training depends on: settings, model, and the text, of which the first batch stands for all."""
    settings = {name: value for name, value in asdict(config).items() if name != "checkpoint_every"}
    settings["auxiliary"] = AUXILIARY_FEATURES, AUXILIARY_WEIGHT
    return f"{settings} {identity(model)} {hashlib.blake2b(checksum(tokens), digest_size=8).hexdigest()}"
