"""Schema of Neuronpedia's graph files, for reading. The classes are the objects in the file."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, FailFast, Field, TypeAdapter
from typing_extensions import TypedDict

from circuits.attribution.feature_graph import MOST_LAYERS
from circuits.formats.neuronpedia.format import SCHEMA_VERSION, TYPE_OF_KIND

LARGEST = torch.finfo(torch.float32).max
KIND_OF_TYPE = {name: kind for kind, name in TYPE_OF_KIND.items()}
NO_LAYER = -1  # of an embedding, whose layer is written "E"


def _check_version(value: int | None) -> int | None:
    if value not in (None, SCHEMA_VERSION):
        raise ValueError(f"this version of circuits reads {SCHEMA_VERSION}; upgrade circuits")
    return value


def _check_type(name: str) -> str:
    if "lorsa" in name.lower():
        raise ValueError("graphs with Lorsa's attention features cannot be read; use transcoders")
    if name not in KIND_OF_TYPE:
        raise ValueError(f"types that can be read are {', '.join(KIND_OF_TYPE)}")
    return name


def _layer_number(layer: Any) -> Any:
    if layer == "E":
        return NO_LAYER
    is_text = isinstance(layer, str) and layer.isdecimal()
    return int(layer) if is_text else layer


Texts = list[str]
NameAndMembers = Annotated[Texts, Field(min_length=1)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Layer = Annotated[int, Field(ge=NO_LAYER, le=MOST_LAYERS), BeforeValidator(_layer_number)]


class Metadata(TypedDict):
    """What the file says about itself."""

    # The version comes first, because in another one everything below can differ.
    schema_version: NotRequired[Annotated[int | None, AfterValidator(_check_version)]]
    prompt_tokens: Annotated[Texts, Field(min_length=1)]
    slug: NotRequired[str | None]
    scan: NotRequired[str | None]
    generation_settings: NotRequired[dict[str, Any] | None]
    pruning_settings: NotRequired[dict[str, Any] | None]


class PageState(TypedDict):
    """Pinned nodes and supernodes."""

    pinnedIds: NotRequired[Texts | None]
    supernodes: NotRequired[list[NameAndMembers] | None]


class NodeEntry(BaseModel):
    """A feature, error, embedding or target."""

    node_id: str
    feature_type: Annotated[str, AfterValidator(_check_type)]
    ctx_idx: Annotated[int, Field(ge=0)]
    layer: Layer
    feature: Annotated[int, Field(ge=-1, lt=10**15)] | None = None
    clerp: str | None = None
    activation: Number | None = None
    token_prob: Number | None = None
    influence: Number | None = None

    @property
    def kind(self) -> int:
        """The kind in a `FeatureGraph`."""
        return KIND_OF_TYPE[self.feature_type]


class Link(TypedDict):
    """An edge."""

    source: str
    target: str
    weight: Number


class GraphFile(TypedDict):
    """A whole file."""

    metadata: Metadata
    qParams: PageState
    nodes: Annotated[list[NodeEntry], Field(min_length=1), FailFast()]
    # FailFast, because a file with millions of wrong links needs one message.
    links: Annotated[list[Link], FailFast()]


GRAPH_FILE = TypeAdapter(GraphFile)
