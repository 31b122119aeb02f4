"""Training transcoders of any model: per layer, per layer with a skip, and cross-layer.

Each step runs the model once to record what features read and what MLPs write. The transcoders of
all layers then learn at once to reconstruct the second from the first with few features: of a
batch, the k per token that write most (BatchTopK; Bussmann, Leask and Nanda 2024,
https://arxiv.org/abs/2412.06410), or any number at a penalty, L1 or tanh (Ameisen et al. 2025,
https://transformer-circuits.pub/2025/attribution-graphs/methods.html). Dead features learn from
the error that the others leave (AuxK; Gao et al. 2024, https://arxiv.org/abs/2406.04093).

After training with BatchTopK, each layer gets a threshold: the smallest length that a firing
feature wrote, averaged over batches. What fires at a token then depends on no other token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam

from circuits.models import Model, check_unchanged, shape_of
from circuits.models.identity import checksum
from circuits.system.arguments import checked_arguments
from circuits.system.code_digest import code_digest
from circuits.system.errors import InputError
from circuits.system.fields import CheckedFields
from circuits.system.files import path_of, read_tensors, write_tensors
from circuits.system.kinds import expect
from circuits.system.numbers import items, python_number, real, shown
from circuits.system.tensors import as_tensor
from circuits.system.torch_modes import without_modes
from circuits.transcoders.training.parameters import (
    TINY,
    FeatureValues,
    Normalization,
    TranscoderKind,
    TranscoderParameters,
    Vectors,
)
from circuits.transcoders.training.quality import record
from circuits.transcoders.transcoder import Reads, Transcoders, Writes

FORMAT, FORMAT_VERSION = "circuits.transcoder_training", 1

Scalar = Float[Tensor, ""]
LayerNumbers = Float[Tensor, " layer"]
Fires = Bool[Tensor, "layer token feature"]
InputsOutputs = tuple[Vectors, Vectors]
Sparsity = Literal["batch_topk", "l1", "tanh"]
DtypeName = Literal["float32", "float64"]
Batches = Callable[[int], tuple[Tensor, Tensor]]
"""Returns the tokens [batch, pos] of a step and their mask, True for real tokens. It must return
the same for the same step, so that an interrupted training can be resumed."""

Progress = Callable[[int, float], None]

# Where features read and write.
READS_WRITES: dict[str, tuple[Reads, Writes]] = {
    "plt": ("mlp_input", "mlp"),
    "skip-plt": ("mlp_input", "mlp"),
    "clt": ("residual", "residual"),
}
# The least that counts can be.
LEAST = {"n_features": 1, "steps": 1, "dead_after": 0, "checkpoint_every": 1}
CALIBRATION_BATCHES = 16
TANH_SCALE = 10
AUXILIARY_FEATURES, AUXILIARY_WEIGHT = 64, 0.2


@dataclass(frozen=True)
class Training(CheckedFields):
    """Settings of training.

    >>> Training(kind="clt", n_features=256, k=(8,)).k
    (8.0,)
    """

    kind: TranscoderKind = "plt"
    """PLTs read what the MLP reads, after its norm; CLTs read the residual stream."""
    n_features: int = 512
    """Number of features in each layer."""
    sparsity: Sparsity = "batch_topk"
    """A fixed mean number of firing features (batch_topk), or a penalty on activations."""
    k: tuple[float, ...] = (16,)
    """Mean number of features that fire at a token: one number, or one for each layer."""
    penalty: tuple[float, ...] = (0.01,)
    """Weight of the l1 or tanh penalty: one number, or one for each layer."""
    steps: int = 4000
    """Number of batches."""
    learning_rate: float = 4e-3
    """Peak for Adam. It rises during the first 5 % of the steps and falls during the last half."""
    dead_after: int = 15_000
    """A feature that has not fired for this many tokens is dead."""
    seed: int = 0
    """Seed of the initial weights."""
    dtype: DtypeName = "float32"
    """Precision of training."""
    checkpoint_every: int = 200
    """Number of steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("k", "penalty"):
            given = getattr(self, name)
            is_one = python_number(given) is not None
            numbers = [given] if is_one else items(given, name)
            checked = tuple(real(number, name) for number in numbers)
            object.__setattr__(self, name, checked)


@checked_arguments
@without_modes()
def train_transcoders(
    model: Model,
    batches: Batches,
    config: Training,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Transcoders:
    """Train transcoders for all layers of a model.

    The model, its flags and the state of all random generators are left unchanged.

    Args:
        model: the model whose MLPs are approximated.
        batches: the training text: a function from the number of a step to tokens [batch, pos] and
            a mask [batch, pos] of real tokens, with padding on either side. The first real token of
            each prompt is not used.
        config: the settings.
        checkpoint: a file that stores the state of training. If it exists, training continues from
            it, with the same result as without the interruption.
        progress: called after each step with the number of steps done and the loss.

    Returns:
        The transcoders. Their activation is `JumpReLU` with `batch_topk`, otherwise `ReLU`.

    Raises:
        InputError: the settings do not fit the model; a batch does not, or has no tokens after the
            first of a prompt; or the checkpoint was written with other settings, another model or
            text.

    Example:
        >>> import circuits, torch
        >>> model = circuits.load_model("toy-world")
        >>> def batches(step):
        ...     generator = torch.Generator().manual_seed(step)
        ...     tokens = torch.randint(model.cfg.d_vocab, (4, 16), generator=generator)
        ...     return tokens, torch.ones_like(tokens, dtype=torch.bool)
        >>> train_transcoders(model, batches, Training(n_features=32, k=(4,), steps=2))
        Transcoders('toy-world-plt', PLT, 4 layers of 32 features, jump_relu)
    """
    _check(model, config)
    if not callable(batches) or isinstance(batches, type):
        raise InputError(f"batches={shown(batches)}: give a function of the number of a step.")
    expect(progress, Callable | None, "a function as progress", "leave it out")
    trainer = _Trainer(model, batches, config)
    path = None if checkpoint is None else path_of(checkpoint)
    first = 1
    if path is not None and path.exists():
        first = trainer.restore(path) + 1
    for done in range(first, config.steps + 1):
        loss = trainer.learn(done)
        is_due = done % config.checkpoint_every == 0 or done == config.steps
        if path is not None and is_due:
            trainer.save(path, done)
        if progress is not None:
            progress(done, loss.item())
    return trainer.transcoders()


class _Trainer:
    """The model with its text, and all that changes in training.

    Attributes:
        norms: the normalization of MLP inputs and of outputs, from the first batch.
        silent: [layer feature], number of tokens since each feature last fired.
    """

    def __init__(self, model: Model, batches: Batches, config: Training) -> None:
        self.model = model
        self.batches = batches
        self.config = config
        inputs, outputs = self._record(0)
        self.norms = Normalization.of(inputs), Normalization.of(outputs)
        kind, n_features = config.kind, config.n_features
        self.parameters = TranscoderParameters.initial(kind, n_features, inputs, config.seed)
        self.optimizer = _adam(self.parameters.tensors())
        shape = (len(inputs), n_features)
        self.silent = inputs.new_zeros(shape).long()

    def _record(self, step: int) -> InputsOutputs:
        # MLP inputs and outputs on the text of a step, not yet normalized.
        reads, writes = READS_WRITES[self.config.kind]
        tokens, mask = self._batch(step)
        inputs, outputs = record(self.model, reads, writes, tokens, mask)
        dtype = getattr(torch, self.config.dtype)
        return inputs.to(dtype), outputs.to(dtype)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        # The tokens of a step and their mask, without rows that are padding alone.
        found = self.batches(step)
        if not isinstance(found, Sequence) or len(found) != 2:
            raise InputError(
                f"batches({step}) returned {shown(found)}; it must return tokens and their mask."
            )
        names = f"the tokens of batches({step})", f"the mask of batches({step})"
        tokens, mask = map(as_tensor, found, names)
        if tokens.dim() != 2 or mask.shape != tokens.shape:
            raise InputError(
                f"batches({step}) returned tokens of shape {tuple(tokens.shape)} and a mask of "
                f"shape {tuple(mask.shape)}; both must be [prompt, position]."
            )
        some = mask.any(1)
        if not some.any():
            raise InputError(
                f"batches({step}) returned a mask of {tuple(mask.shape)} without any real tokens; "
                "it must be True where tokens are real."
            )
        return tokens[some], mask[some]

    def _normalized(self, step: int) -> InputsOutputs:
        inputs, outputs = self._record(step)
        input_norm, output_norm = self.norms
        return input_norm.apply(inputs), output_norm.apply(outputs)

    @cached_property
    def _fingerprint(self) -> str:
        # All that the result depends on; the first batch represents the text.
        settings = asdict(self.config)
        del settings["checkpoint_every"]
        settings["auxiliary"] = AUXILIARY_FEATURES, AUXILIARY_WEIGHT
        tokens, _ = self._batch(0)
        digest = hashlib.blake2b(checksum(tokens), digest_size=8)
        return f"{settings} {code_digest(self.model).key()} {digest.hexdigest()}"

    def _tensors(self) -> dict[str, Tensor]:
        # All tensors that change, by their names in a checkpoint.
        tensors = {"silent": self.silent}
        for index, tensor in enumerate(self.parameters.tensors()):
            tensors[f"weight.{index}"] = tensor
            for name, moment in self.optimizer.state[tensor].items():
                tensors[f"optimizer.{index}.{name}"] = moment
        return tensors

    def save(self, path: Path, done: int) -> None:
        """Write a checkpoint after `done` steps."""
        metadata = {"step": str(done), "settings": self._fingerprint}
        write_tensors(path, self._tensors(), metadata, FORMAT, FORMAT_VERSION)

    @torch.no_grad()
    def restore(self, path: Path) -> int:
        """Read a checkpoint; return the number of steps done."""
        stored, metadata = read_tensors(path, FORMAT, FORMAT_VERSION)
        if metadata["settings"] != self._fingerprint:
            raise InputError(f"{path} was written with other settings, model or text; delete it.")
        for name, tensor in self._tensors().items():
            tensor.copy_(stored[name])
        return int(metadata["step"])

    def learn(self, done: int) -> Scalar:
        """Take a step, after which `done` are done; return the loss before it."""
        inputs, outputs = self._normalized(done - 1)
        share = done / self.config.steps
        # Warm-up over the first 5 % of the steps, linear decay over the last half.
        schedule = min(1.0, share / 0.05, (1 - share) / 0.5)
        [group] = self.optimizer.param_groups
        group["lr"] = self.config.learning_rate * schedule
        with torch.enable_grad():
            loss = self._loss(inputs, outputs)
            self.optimizer.zero_grad()
            loss.backward()
        clip_grad_norm_(self.parameters.tensors(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def _loss(self, inputs: Vectors, outputs: Vectors) -> Scalar:
        # Unexplained variance, sparsity penalty and auxiliary loss; also counts silent tokens.
        parameters = self.parameters
        pre = parameters.preactivations(inputs)
        fires = self._fires(pre)
        activations = torch.where(fires, pre, 0)
        error = outputs - parameters.reconstruct(inputs, activations)
        loss = _unexplained(outputs, error)
        if self.config.sparsity != "batch_topk":
            loss = loss + self._penalty(activations)
        self.silent.add_(inputs.shape[1])
        self.silent.masked_fill_(fires.any(1), 0)
        dead = self.silent > self.config.dead_after
        return loss + AUXILIARY_WEIGHT * auxiliary_loss(parameters, inputs, error.detach(), dead)

    def _penalty(self, activations: FeatureValues) -> Scalar:
        # l1: sum_l penalty_l mean_t sum_f length_f,   tanh: the same of tanh(TANH_SCALE length_f)
        lengths = activations * self.parameters.decoder_lengths()
        if self.config.sparsity == "tanh":
            lengths = (TANH_SCALE * lengths).tanh()
        per_layer = lengths.sum(2).mean(1)
        penalty = lengths.new_tensor(self.config.penalty)
        return (penalty * per_layer).sum()

    @torch.no_grad()
    def _fires(self, pre: FeatureValues) -> Fires:
        if self.config.sparsity != "batch_topk":
            return pre > 0
        lengths = pre * self.parameters.decoder_lengths()
        smallest = self._smallest_firing(lengths)
        return lengths > smallest[:, None, None]

    def _smallest_firing(self, lengths: FeatureValues) -> LayerNumbers:
        # The (k * tokens)-th largest length in each layer; features must write more to fire.
        # One fewer fires than k * tokens, as with a JumpReLU of this threshold.
        n_layers, n_tokens, _ = lengths.shape
        k_of_layers = self.config.k
        if len(k_of_layers) == 1:
            k_of_layers *= n_layers
        smallest = []
        for k, values in zip(k_of_layers, lengths, strict=True):
            n_firing = max(1, round(k * n_tokens))
            largest, _ = values.flatten().topk(n_firing, sorted=False)
            smallest.append(largest.min())
        return torch.stack(smallest).clamp(min=0)

    @torch.no_grad()
    def _thresholds(self) -> LayerNumbers:
        # The smallest length of a firing feature, averaged over batches not seen in training.
        parameters, n_steps = self.parameters, self.config.steps
        total = parameters.encoder.new_zeros(len(self.silent))
        for step in range(n_steps, n_steps + CALIBRATION_BATCHES):
            inputs, _ = self._normalized(step)
            lengths = parameters.preactivations(inputs) * parameters.decoder_lengths()
            total += self._smallest_firing(lengths)
        return total / CALIBRATION_BATCHES

    def transcoders(self) -> Transcoders:
        """Convert what was trained."""
        kind = self.config.kind
        thresholds = self._thresholds() if self.config.sparsity == "batch_topk" else None
        trained = self.parameters.to_transcoders(*self.norms, thresholds)
        reads, writes = READS_WRITES[kind]
        name = f"{shape_of(self.model).model_name}-{kind}"
        return replace(trained, reads=reads, writes=writes, name=name)


def _adam(parameters: list[Tensor]) -> Adam:
    optimizer = Adam(parameters, betas=(0.9, 0.99))
    for tensor in parameters:
        # Adam begins like this. A checkpoint is copied into these tensors.
        optimizer.state[tensor] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }
    return optimizer


def auxiliary_loss(
    parameters: TranscoderParameters,
    inputs: Vectors,
    error: Vectors,
    dead: Bool[Tensor, "layer feature"],
) -> Scalar:
    """Share of the error that the dead features with the largest pre-activations would leave."""
    if not dead.any():
        return inputs.new_zeros(())
    is_alive = ~dead[:, None]
    pre = parameters.preactivations(inputs)
    pre = pre.masked_fill(is_alive, -torch.inf)
    left = error - parameters.decode(_largest_activations(pre))
    # |error - dead features|^2 / |error|^2
    squares = _squares(error).clamp(min=TINY)
    shares = _squares(left) / squares
    return shares[dead.any(1)].sum()


def _largest_activations(pre: FeatureValues) -> FeatureValues:
    n_chosen = min(AUXILIARY_FEATURES, pre.shape[2])
    values, features = pre.topk(n_chosen, dim=2)
    # A layer can have fewer dead features than that; the others have activation 0.
    activations = torch.zeros_like(pre)
    return activations.scatter(2, features, values.relu())


def _unexplained(outputs: Vectors, error: Vectors) -> Scalar:
    # sum_l |y_l - approximation_l|^2 / |y_l - mean(y_l)|^2
    deviation = outputs - outputs.mean(1, keepdim=True)
    shares = _squares(error) / _squares(deviation)
    return shares.sum()


def _squares(vectors: Vectors) -> LayerNumbers:
    return vectors.square().sum((1, 2))


def _check(model: Model, config: Training) -> None:
    check_unchanged(model)
    expect(config, Training, "the settings of training", "make a Training(...)")
    cfg = shape_of(model)
    if cfg.attn_only:
        raise InputError(f"{cfg.model_name} has no MLPs, so there is nothing to learn.")
    for name, least in LEAST.items():
        count = getattr(config, name)
        if count < least:
            raise InputError(f"{name}={count}: give {least} or more.")
    rate = config.learning_rate
    if not 0 <= rate < math.inf:
        raise InputError(f"learning_rate={rate}: give a finite number, 0 or more.")
    _check_layers(config, cfg.n_layers)


def _check_layers(config: Training, n_layers: int) -> None:
    for name in ("k", "penalty"):
        values = getattr(config, name)
        are_positive = all(0 < value < math.inf for value in values)
        if len(values) not in (1, n_layers) or not are_positive:
            raise InputError(
                f"{name}={values}: give one positive number, or one for each of the {n_layers} "
                "layers."
            )
    if max(config.k) > config.n_features:
        raise InputError(
            f"k={config.k}, and n_features={config.n_features}: give k at most n_features."
        )
