"""How models of TransformerLens' classes are read, run and checked, behind one interface.

The rest of this room calls `backend(model)`. Each class of models has a subclass of `Backend` in a
folder of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from circuits.models.layers.shape import ModelShape
from circuits.models.layers.weights import ModelWeights
from circuits.system.errors import InputError
from circuits.system.kinds import one_of

try:
    from transformer_lens import HookedTransformer
except ImportError:
    # TransformerLens 4 has no such class.
    HookedTransformer = TransformerBridge  # type: ignore[assignment, misc]

Model: TypeAlias = HookedTransformer | TransformerBridge

Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation and returns its replacement, or None to leave it unchanged."""

Hooks = Sequence[tuple[str, Hook]]
Inputs = Literal["plain", "separate", "gradients"]
BackendName = Literal["hooked_transformer", "bridge"]
Changes = dict[str, str]
"""What is changed, by the name of the module, or of what modules share."""

# Under these names wrappers keep a model.
INSIDE = ("_orig_mod", "module", "base_model", "model")
HAS_HOOKED_TRANSFORMER = HookedTransformer.__name__ != TransformerBridge.__name__


class Backend(ABC):
    """What this room needs to know of a model, and to do with it.

    Names of activations are TransformerLens', such as `blocks.0.attn.hook_z`.
    """

    classes: ClassVar[dict[type, type[Backend]]] = {}

    def __init__(self, model: Any) -> None:
        self.model = model

    def __init_subclass__(cls, of: type, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Backend.classes[of] = cls

    @cached_property
    def shape(self) -> ModelShape:
        """Sizes and kinds."""
        return self.read_shape()

    @cached_property
    def weights(self) -> ModelWeights:
        """A view of the weights."""
        return self.read_weights()

    @abstractmethod
    def read_shape(self) -> ModelShape:
        """Return sizes and kinds as they are now."""

    @abstractmethod
    def read_weights(self) -> ModelWeights:
        """Return a view of the weights as they are now."""

    @abstractmethod
    def modules(self) -> Iterator[nn.Module]:
        """Return all modules, those of a model that is wrapped as well."""

    @abstractmethod
    def parameters(self) -> Mapping[str, Tensor]:
        """Return all parameters by name."""

    @abstractmethod
    def hook_names(self) -> tuple[str, ...]:
        """Return the names of all activations that hooks can see, whether or not a run does."""

    @abstractmethod
    def run(self, tokens: Tensor, mask: Tensor, layers: int | None) -> Tensor:
        """Run the model to the residual stream after some layers, or with None to the logits."""

    @abstractmethod
    def last_step(self, residual: Tensor) -> Tensor:
        """Compute logits from the final residual stream."""

    @abstractmethod
    def hooked(self, hooks: Hooks, shape: Sequence[int] | None) -> AbstractContextManager[None]:
        """Apply hooks to activations, and refuse those that no run inside computes."""

    @abstractmethod
    def received(self, names: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
        """Record what modules are given, by their names."""

    @abstractmethod
    def inputs(self, kind: Inputs) -> AbstractContextManager[None]:
        """Let runs inside have separate inputs of nodes, gradients of them, or neither."""

    @abstractmethod
    def changes(self) -> Changes:
        """Describe what a user has changed that a run honours."""

    @abstractmethod
    def problems(self) -> Iterator[str]:
        """Say why the model cannot be run as it is."""

    @abstractmethod
    def computed(self) -> dict[str, Any]:
        """Return what decides what the model computes, beside its weights, for a digest."""

    @abstractmethod
    def first_fingerprint(self) -> str | None:
        """Return the fingerprint that the first version of the package wrote, if it can be."""

    @abstractmethod
    def last_step_changed(self) -> bool:
        """Whether the final norm or the unembedding has been changed."""

    @abstractmethod
    def unsupported(self) -> Iterator[str]:
        """Say why the residual stream is not the sum of the model's components."""


# Models in which nothing may change now (`unchanged`), with what has been read of them.
_UNCHANGED: WeakKeyDictionary[Any, Backend] = WeakKeyDictionary()


def backend(model: object) -> Backend:
    """Return how a model is read and run; anything but a model of TransformerLens is refused."""
    for kind, implementation in Backend.classes.items():
        if isinstance(model, kind):
            return _UNCHANGED.get(model) or implementation(model)
    known = tuple(Backend.classes)
    inside = [name for name in INSIDE if isinstance(getattr(model, name, None), known)]
    remedy = f"hand over its .{inside[0]}" if inside else "load it with circuits.load_model"
    kinds = " or a ".join(kind.__name__ for kind in reversed(known))
    raise InputError(f"expected a {kinds}, got {type(model).__name__}; {remedy}.")


@contextmanager
def unchanged(model: Model) -> Iterator[None]:
    """Read the sizes of a model once in all that is done inside, where nothing may change them."""
    if model in _UNCHANGED:
        yield
        return
    _UNCHANGED[model] = backend(model)
    try:
        yield
    finally:
        del _UNCHANGED[model]


def check_backend(name: BackendName | None) -> None:
    """Refuse a class that there is not, or not in this version of TransformerLens."""
    if name is None:
        return
    one_of(name, "backend", get_args(BackendName))
    if name == "hooked_transformer" and not HAS_HOOKED_TRANSFORMER:
        raise InputError(
            "backend='hooked_transformer': this version of TransformerLens has no such class; use "
            "backend='bridge', or install transformer-lens<4."
        )


def check_class(model: object) -> None:
    """Refuse anything but a model of TransformerLens."""
    backend(model)


def shape_of(model: Model) -> ModelShape:
    """Return the sizes and kinds of a model."""
    return backend(model).shape


def weights_of(model: Model) -> ModelWeights:
    """Return a view of a model's weights, and its layers as functions of tensors."""
    return backend(model).weights


def hook_names(model: Model) -> tuple[str, ...]:
    """Return the names of all hook points, whether or not a run computes them."""
    return backend(model).hook_names()
