"""Run folders of attribution graphs: one prompt.

<out>/graphs/<first words of the prompt>-<digest>/
    graph.safetensors   the whole graph
    record.json         every setting, versions, scores, counts and times
    graph.html          a page to explore the graph, which works offline
    groups.json         pinned nodes and groups, once they are saved in `circuits view`
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from circuits.attribution.build import Direction
from circuits.attribution.explained import listed
from circuits.attribution.feature_graph import FEATURE, FILE, FeatureGraph
from circuits.attribution.influence import completeness_score, pruned, replacement_score
from circuits.discovery.discoverer import as_json
from circuits.discovery.methods.attribution_graph import AttributionGraph, Explained
from circuits.models import Model, check_model
from circuits.plotting.graph_page.data import GraphData
from circuits.plotting.graph_page.groups import load_groups
from circuits.plotting.graph_page.page import graph_page
from circuits.runs.run_folder import LOCK, RECORD, describe_setup, locked, read_record
from circuits.system.code_digest import code_digest
from circuits.system.errors import InputError, NotWrittenError
from circuits.system.files import is_file, json_text, path_of, write_bytes, write_json
from circuits.system.kinds import expect
from circuits.system.tensors import digest
from circuits.tasks.tokenization import PromptTokens, prompt_tokens

PAGE = "graph.html"
RECORD_FORMAT, FORMAT_VERSION = "circuits.graph_run", 1
# What a record must hold, with the type in JSON.
COUNTS = ("features", "edges", "kept_features", "kept_edges")
IN_RECORD: dict[str, Any] = {
    "prompt": str,
    "model": dict,
    "transcoders": dict,
    "explained": list,
    **dict.fromkeys(COUNTS, int),
}
LONGEST_SLUG = 40  # characters
SCORES = {"replacement": replacement_score, "completeness": completeness_score}


@dataclass(frozen=True)
class GraphRun:
    """A finished attribution graph in its run folder.

    Attributes:
        folder: the run folder.
        graph: the whole graph, not pruned.
        record: the content of `record.json`.
        reused: whether the graph was found in the folder instead of computed.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> method = circuits.AttributionGraph("toy-world-clt")
    >>> found = circuits.run_graph(method, model, "Dallas is in", out=tempfile.mkdtemp())
    >>> found.record["edges"] == len(found.graph)
    True
    """

    folder: Path
    graph: FeatureGraph
    record: Mapping[str, Any]
    reused: bool

    @property
    def details(self) -> dict[str, str]:
        """Settings and results, for people."""
        record = self.record
        details = {
            "model": record["model"]["name"],
            "transcoders": record["transcoders"]["name"],
            "explains": ", ".join(record["explained"]),
            "features": f"{record['features']:,}, {record['kept_features']:,} after pruning",
            "edges": f"{record['edges']:,}, {record['kept_edges']:,} after pruning",
        }
        for name in SCORES:
            score = record[f"{name}_score"]
            details[f"{name} score"] = "undefined" if score is None else f"{score:.2f}"
        return details

    @property
    def groups(self) -> dict[str, list[str]]:
        """The supernodes that a reader made in `circuits view`, as `save_neuronpedia` takes them.

        Raises:
            InputError: `groups.json` is damaged.
        """
        groups: dict[str, list[str]] = {}
        data = GraphData.of(self.graph)
        kept = load_groups(self.folder, data)
        for supernode in kept["supernodes"]:
            members = groups.setdefault(supernode["name"], [])
            members.extend(supernode["nodes"])
        return groups


def run_graph(
    method: AttributionGraph,
    model: Model,
    prompt: str | Sequence[int] | PromptTokens,
    *,
    explain: Sequence[Explained] | None = None,
    prepend_bos: bool | None = None,
    out: str | Path = "runs",
    notes: Mapping[str, Any] | None = None,
) -> GraphRun:
    """Compute a prompt's attribution graph into a run folder, or return the one already there.

    Args:
        prompt: text or tokens.
        explain, prepend_bos: see `AttributionGraph.attribute`.
        out: the folder of all runs.
        notes: recorded as well.

    Raises:
        InputError: see `AttributionGraph.attribute`; or a file there is damaged or too new.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> method = circuits.AttributionGraph("toy-world-clt")
    >>> circuits.run_graph(method, model, "Dallas is in", out=tempfile.mkdtemp()).reused
    False
    """
    expect(method, AttributionGraph, "an AttributionGraph", "make one with your transcoders")
    check_model(model)
    expect(notes, Mapping | None, "a dictionary of notes", "give names and JSON values")
    # Read once, as it may be a generator.
    explain = None if explain is None else listed(explain)
    # Load the transcoders once: the digest needs them as well as the method.
    method = replace(method, transcoders=method.loaded)
    tokens = prompt_tokens(model, prompt, prepend_bos)
    numbers = map(str, tokens.tolist())
    text = prompt if isinstance(prompt, str) else " ".join(numbers)
    name = f"{_slug(text)}-{_digest(method, model, tokens, explain)}"
    folder = path_of(out) / "graphs" / name
    json_text(notes or {})
    # Read without a lock, so that it can be used where nothing can be written.
    if is_file(folder / RECORD):
        return _found_again(folder)
    with _removing_if_unused(folder), locked(folder):
        if (folder / RECORD).exists():
            return _found_again(folder)
        started = time.perf_counter()
        graph = method.attribute(model, prompt, explain=explain, prepend_bos=prepend_bos)
        seconds = time.perf_counter() - started
        record = {
            "prompt": text,
            **describe_setup(model),
            **_describe(method, graph),
            "seconds": seconds,
            "notes": dict(notes or {}),
        }
        found = GraphRun(folder, graph, record, reused=False)
        graph.save(folder)
        _write_page(found)
        # The record comes last: a folder that has one holds a complete graph.
        write_json(folder / RECORD, record, RECORD_FORMAT, FORMAT_VERSION)
    return found


def load_graph_run(folder: str | Path) -> GraphRun:
    """Read a finished attribution graph from its run folder.

    Raises:
        InputError: the folder holds none, a damaged file, or one from a newer version.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> method = circuits.AttributionGraph("toy-world-clt")
    >>> found = circuits.run_graph(method, model, "Dallas is in", out=tempfile.mkdtemp())
    >>> circuits.load_graph_run(found.folder).record == found.record
    True
    """
    folder = path_of(folder)
    if not is_file(folder / RECORD):
        raise InputError(
            f"{folder} holds no finished graph; "
            f"give a folder with {RECORD} and {FILE}, as `circuits graph` writes it."
        )
    record = read_record(folder, RECORD_FORMAT, FORMAT_VERSION, IN_RECORD)
    graph = FeatureGraph.load(folder)
    return GraphRun(folder, graph, record, reused=True)


@contextlib.contextmanager
def _removing_if_unused(folder: Path) -> Iterator[None]:
    """Remove the folder after an error that left nothing but the lock in it."""
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
        found = load_graph_run(folder)
    except InputError as error:
        raise InputError(f"{error} To have it made again, delete the folder {folder}.") from error
    if not is_file(folder / PAGE):
        # The graph can be used all the same where nothing can be written.
        with contextlib.suppress(NotWrittenError):
            _write_page(found)
    return found


def _slug(prompt: str) -> str:
    # Text with and without its <bos> has the same tokens, and is to be found in one folder.
    without_tags = re.sub("<[^<>]*>", "", prompt)
    words = re.findall(r"[a-z0-9]+", without_tags.lower())
    return "-".join(words)[:LONGEST_SLUG].strip("-") or "prompt"


def _digest(
    method: AttributionGraph,
    model: Model,
    tokens: PromptTokens,
    explain: Sequence[Explained] | None,
) -> str:
    parts = [
        method.identity(),
        code_digest(model).key(),
        tokens.tolist(),
        explain and list(map(_explained_as_json, explain)),
    ]
    return digest(parts, size=4)


def _explained_as_json(explained: Explained) -> Any:
    """A JSON value that differs between any two different targets."""
    if not isinstance(explained, Direction):
        return as_json(explained)
    vector = explained.vector.detach().double().cpu()
    fingerprint = blake2b(vector.numpy().tobytes())
    fields = vars(explained) | {"vector": fingerprint.hexdigest()}
    return list(fields.values())


def _describe(method: AttributionGraph, graph: FeatureGraph) -> dict[str, Any]:
    kept = pruned(graph, node_threshold=method.node_threshold, edge_threshold=method.edge_threshold)
    return {
        "method": method.name,
        "settings": method.settings(),
        "transcoders": vars(graph.transcoders),
        "tokens": graph.tokens.tolist(),
        "explained": [target.label for target in graph.targets],
        **_counts(graph),
        **{f"kept_{name}": value for name, value in _counts(kept).items()},
    }


def _counts(graph: FeatureGraph) -> dict[str, Any]:
    n_features = int(graph.is_kind(FEATURE).sum())
    counts: dict[str, Any] = {"features": n_features, "edges": len(graph)}
    for name, function in SCORES.items():
        score = function(graph)
        # JSON has no NaN: a score that is not defined is null.
        counts[f"{name}_score"] = None if math.isnan(score) else score
    return counts


def _write_page(found: GraphRun) -> None:
    title = found.record["prompt"]
    page = graph_page(found.graph, title=title, details=found.details)
    write_bytes(found.folder / PAGE, page.encode())
