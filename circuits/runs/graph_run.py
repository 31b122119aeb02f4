"""One attribution graph, in a folder that is found again instead of computed again.

<out>/graphs/<first words of the prompt>-<digest>/
    graph.safetensors   the whole graph
    record.json         every setting, versions, scores, counts and times
    graph.html          the pruned graph, to be explored; it works from the file, offline
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from circuits.attribution.build import Direction
from circuits.attribution.feature_graph import FEATURE, FILE, FeatureGraph
from circuits.attribution.influence import completeness_score, pruned, replacement_score
from circuits.discovery.discoverer import as_json
from circuits.discovery.methods.attribution_graph import AttributionGraph, Explained
from circuits.models import Model
from circuits.models.identity import identity
from circuits.plotting.graph_page.data import GraphData
from circuits.plotting.graph_page.groups import load_groups
from circuits.plotting.graph_page.page import graph_page
from circuits.runs.circuit_run import LOCK, PACKAGES, RECORD, locked
from circuits.system.errors import InputError
from circuits.system.files import read_json, write_bytes, write_json
from circuits.tasks.tokenization import prompt_tokens

PAGE = "graph.html"
RECORD_FORMAT, FORMAT_VERSION = "circuits.graph_run", 1
SLUG = 40  # characters


@dataclass(frozen=True)
class GraphRun:
    """A finished graph.

    Attributes:
        folder: where it lies.
        graph: the whole of it.
        record: what `record.json` says.
        reused: it was there already.
    """

    folder: Path
    graph: FeatureGraph
    record: Mapping[str, Any]
    reused: bool

    @property
    def groups(self) -> dict[str, list[str]]:
        """The supernodes that a reader made where `circuits view` served the folder: nodes by name, as `save_neuronpedia` takes them.

        Raises:
            InputError: `groups.json` is damaged.
        """
        groups: dict[str, list[str]] = {}
        for one in load_groups(self.folder, GraphData.of(self.graph))["supernodes"]:
            groups[one["name"]] = groups.get(one["name"], []) + one["nodes"]
        return groups


def run_graph(
    method: AttributionGraph,
    model: Model,
    prompt: str | Sequence[int] | Int[Tensor, " pos"],
    *,
    explain: Sequence[Explained] | None = None,
    out: str | Path = "runs",
    notes: Mapping[str, Any] | None = None,
) -> GraphRun:
    """Make a prompt's graph into a folder, or take the one that is there.

    Raises:
        InputError: see `AttributionGraph.attribute`; or the folder holds a damaged file or one from a newer version.
    """
    method = replace(method, transcoders=method.loaded)
    tokens = prompt_tokens(model, prompt)
    text = prompt if isinstance(prompt, str) else " ".join(map(str, tokens.tolist()))
    folder = Path(out) / "graphs" / f"{_slug(text)}-{_digest(method, model, tokens, explain)}"
    with _gone_if_empty(folder), locked(folder):
        if (folder / RECORD).exists():
            found = _found_again(folder)
            if not (folder / PAGE).exists():
                write_bytes(
                    folder / PAGE,
                    graph_page(found.graph, title=text, details=_details(found.record)).encode(),
                )
            return found
        started = time.perf_counter()
        graph = method.attribute(model, tokens, explain=explain)
        seconds = time.perf_counter() - started
        small = pruned(
            graph, node_threshold=method.node_threshold, edge_threshold=method.edge_threshold
        )
        record = {
            **_circumstances(method, model, text, graph, small),
            "seconds": seconds,
            "notes": dict(notes or {}),
        }
        graph.save(folder)
        write_bytes(folder / PAGE, graph_page(graph, title=text, details=_details(record)).encode())
        # The record comes last: where it stands, the run is whole.
        write_json(folder / RECORD, record, RECORD_FORMAT, FORMAT_VERSION)
    return GraphRun(folder, graph, record, reused=False)


@contextlib.contextmanager
def _gone_if_empty(folder: Path) -> Iterator[None]:
    """A folder of which nothing came is not left behind."""
    try:
        yield
    except InputError:
        with contextlib.suppress(OSError):
            if {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
        raise


def _found_again(folder: Path) -> GraphRun:
    try:
        return load_graph_run(folder)
    except InputError as error:
        raise InputError(f"{error} To have it made again, delete the folder {folder}.") from error


def load_graph_run(folder: str | Path) -> GraphRun:
    """A finished graph.

    Raises:
        InputError: the folder holds none, a damaged file, or one from a newer version.
    """
    folder = Path(folder)
    if not (folder / RECORD).exists():
        raise InputError(
            f"{folder} holds no finished graph; give a folder with {RECORD} and {FILE}, as `circuits graph` writes it."
        )
    record = read_json(folder / RECORD, RECORD_FORMAT, FORMAT_VERSION)
    return GraphRun(folder, FeatureGraph.load(folder), record, reused=True)


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:SLUG].strip("-") or "prompt"


def _digest(
    method: AttributionGraph,
    model: Model,
    tokens: Int[Tensor, " pos"],
    explain: Sequence[Explained] | None,
) -> str:
    explained = None if explain is None else [_in_full(one) for one in explain]
    parts = [
        version("circuits"),
        method.identity(),
        identity(model).weights,
        tokens.tolist(),
        explained,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).hexdigest()


def _in_full(explained: Explained) -> Any:
    """What is explained as a JSON value that differs where it does."""
    if isinstance(explained, Direction):
        vector = hashlib.blake2b(
            explained.vector.double().cpu().contiguous().numpy().tobytes()
        ).hexdigest()
        return [
            explained.label,
            vector,
            explained.bias,
            explained.weight,
            explained.position,
            explained.token,
        ]
    return as_json(explained)


def _circumstances(
    method: AttributionGraph, model: Model, prompt: str, graph: FeatureGraph, small: FeatureGraph
) -> dict[str, Any]:
    who, made_with = identity(model), graph.transcoders
    assert made_with is not None
    return {
        "method": method.name,
        "settings": method.settings(),
        "model": {
            "name": who.name,
            "shape": dict(who.shape),
            "weights": who.weights,
            "dtype": str(model.cfg.dtype),
        },
        "transcoders": vars(made_with),
        "prompt": prompt,
        "tokens": graph.tokens.tolist(),
        "explained": [target.label for target in graph.targets],
        "features": int(graph.is_kind(FEATURE).sum()),
        "edges": len(graph),
        "kept_features": int(small.is_kind(FEATURE).sum()),
        "kept_edges": len(small),
        "replacement_score": _number(replacement_score(graph)),
        "completeness_score": _number(completeness_score(graph)),
        "kept_replacement_score": _number(replacement_score(small)),
        "kept_completeness_score": _number(completeness_score(small)),
        "versions": {name: version(name) for name in PACKAGES},
        "device": str(model.cfg.device),
    }


def _number(score: float) -> float | None:
    """JSON has no NaN; a score that is not defined is null."""
    return None if math.isnan(score) else score


def score_text(score: float | None) -> str:
    """A score as people read it."""
    return "undefined" if score is None else f"{score:.2f}"


def _details(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        "model": record["model"]["name"],
        "transcoders": record["transcoders"]["name"],
        "explains": ", ".join(record["explained"]),
        "features": f"{record['features']:,}, {record['kept_features']:,} after pruning",
        "edges": f"{record['edges']:,}, {record['kept_edges']:,} after pruning",
        "replacement score": score_text(record["replacement_score"]),
        "completeness score": score_text(record["completeness_score"]),
    }
