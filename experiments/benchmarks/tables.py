"""Write the results' tables into the README beside this file and into the documentation.

    python experiments/benchmarks/tables.py            # writes them between the files' markers
    python experiments/benchmarks/tables.py --check    # fails if a file differs

Results are `results/BENCHMARK-MACHINE.json`. A time is the median of its repetitions, followed by
their range.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables -->", "<!-- /tables -->"
# Why a part of the suite found nothing, or not all.
NOTHING = {"skipped", "failed", "stopped"}

Results = Mapping[str, Any]
Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Config:
    """Files to read and write."""

    check: bool = False
    """Write nothing; fail if a file differs from the results."""
    results: Path = HERE / "results"
    """Folder of results."""
    readme: Path = HERE / "README.md"
    """File for all tables."""
    summary: Path = HERE.parents[1] / "docs" / "benchmarks.md"
    """File for the summary."""


def _small(value: float) -> str:
    return f"{value:.1e}"


def main(config: Config) -> None:
    for readme, text in (
        (config.readme, tables(config.results)),
        (config.summary, summary(config.results)),
    ):
        before = readme.read_text()
        after = updated(before, text)
        if config.check and after != before:
            sys.exit(
                f"{readme} differs from what {config.results} gives: run `python "
                f"experiments/benchmarks/tables.py`."
            )
        if not config.check:
            readme.write_text(after)


def updated(readme: str, text: str) -> str:
    """A file's text with the tables between its markers."""
    start, _, rest = readme.partition(BEGIN)
    _, _, end = rest.partition(END)
    return f"{start}{BEGIN}\n\n{text}\n{END}{end}"


def tables(results: Path) -> str:
    """Every benchmark's tables, one for each machine."""
    return "\n".join(_section(name, sorted(results.glob(f"{name}-*.json"))) for name in BENCHMARKS)


def summary(results: Path) -> str:
    """The most informative cases, each against its alternative."""
    rows: Rows = []
    for name, compared in SUMMARIES.items():
        for file in sorted(results.glob(f"{name}-*.json")):
            rows += compared(json.loads(file.read_text()))
    return _table(rows)


def _searches_compared(found: Results) -> Rows:
    rows: Rows = []
    clock = _clock(found)
    for case in found["cases"]:
        if case["case"] not in SUMMARIZED:
            continue
        kept = case["kept"] / case["edges"]
        name = f"exact ACDC: {case['case']} ({case['edges']:,} edges, {kept:.0%} kept)"
        ours = case["seconds"]["incremental + speculation"][clock]
        naive = case["seconds"]["naive"][clock]
        rows.append(_against(name, "one hooked forward pass per edge", naive, ours, found))
    return rows


def _eap_compared(found: Results) -> Rows:
    rows: Rows = []
    for package, peer in found["peers"].items():
        if "seconds" not in peer:
            continue
        ours, theirs = peer["seconds"].values()
        edges = peer["edges"]["shared"]
        name = f"EAP: {found['shape']}, {found['prompts']} prompts ({edges:,} edges)"
        other = f"{package} {peer['versions'][package]}"
        rows.append(_against(name, other, theirs, ours, found))
    return rows


def _graphs_compared(found: Results) -> Rows:
    rows: Rows = []
    clock = _clock(found)
    for case in found["cases"]:
        _, _, shape = case["case"].partition(": ")
        name = f"attribution graph: {shape} ({case['edges']:,} edges)"
        package = f"circuit-tracer {case['versions']['circuit-tracer']}"
        ours = case["seconds"]["ours"][clock]
        for program, batch in BATCHES.items():
            theirs = case["seconds"][program][clock]
            rows.append(_against(name, f"{package}, {batch}", theirs, ours, found))
    return rows


def _extraction_compared(found: Results) -> Rows:
    case, clock = found["cases"][0], _clock(found)
    size = f"{case['layers']} layers, {case['features']:,} each, {case['positions']} positions"
    ours = case["seconds"]["ours"][clock]
    return [
        _against(f"active features of {size}", other, case["seconds"][program][clock], ours, found)
        for program, other in EXTRACTORS.items()
    ]


def _against(
    case: str, other: str, baseline: Sequence[float], ours: Sequence[float], found: Results
) -> dict[str, object]:
    hardware = found["hardware"]
    return {
        "case": case,
        "baseline": other,
        "baseline, s": f"{statistics.median(baseline):.3g}",
        "ours, s": f"{statistics.median(ours):.3g}",
        "speedup": _speedup(baseline, ours),
        "measured on": hardware["gpu"] or f"CPU, threads: {hardware['threads']}",
    }


def _speedup(baseline: Sequence[float], ours: Sequence[float]) -> str:
    return f"{statistics.median(baseline) / statistics.median(ours):.1f}"


def _section(name: str, files: Iterable[Path]) -> str:
    title, tabulate = BENCHMARKS[name]
    measured = [
        json.loads(file.read_text()) for file in files if file.stem.rpartition("-")[0] == name
    ]
    parts = [f"### {title}\n"]
    for found in measured:
        for caption, rows in tabulate(found):
            parts += [f"{caption}\n"] * bool(caption) + [_table(rows)] * bool(rows)
        parts.append(_circumstances(found))
    if not measured:
        parts.append("Not yet measured.\n")
    if name not in ON_CPU_ALONE and not any(found["hardware"]["gpu"] for found in measured):
        parts.append("Not yet measured on a GPU.\n")
    return "\n".join(parts)


def _table(rows: Rows) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([str(row.get(column, "")) for column in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _circumstances(found: Results) -> str:
    hardware, versions = (
        found["hardware"],
        {name: version for name, version in found["versions"].items() if version},
    )
    machine = [
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} of torch's threads"
    ]
    if hardware["gpu"]:
        tf32 = "with" if found.get("allow_tf32") else "without"
        machine = [f"{hardware['gpu']}, driver {hardware.get('driver')}, {tf32} TF32", *machine]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = found["commit"] or "unknown"
    commit = commit[:10] + ", with changes" * commit.endswith("+")
    return f"Measured on {'; '.join(machine)}; {packages}; commit {commit}.\n"


# One function a benchmark: what comes before each of its tables, and their rows.
Tables = Iterator[tuple[str, Rows]]


def _exact_acdc(found: Results) -> Tables:
    yield "", [_search(case["case"], case, _clock(found)) for case in found["cases"]]


def _clock(found: Results) -> str:
    """CPU seconds on a CPU, since other programs lengthen wall-clock time there; else wall-clock
    seconds.
    """
    return "wall" if found["hardware"]["gpu"] else "cpu"


def _search(name: str, case: Results, clock: str) -> dict[str, object]:
    seconds = {program: clocks[clock] for program, clocks in case["seconds"].items()}
    unit, fast = UNITS[clock], "incremental + speculation"
    row: dict[str, object] = {
        "case": name,
        "edges": f"{case['edges']:,}",
        "kept": f"{case['kept']:,}",
    }
    row["decisions that differ"] = case["decisions_that_differ"]
    row |= {
        f"{program}, {unit}": _times(seconds[program])
        for program in ("naive", "incremental", fast)
        if program in seconds
    }
    if "naive" in seconds:
        row["naive / speculation"] = _speedup(seconds["naive"], seconds[fast])
    row |= {
        "evaluations": f"{case['record'][fast]['evaluations']:,}",
        "batches": f"{case['record'][fast]['batches']:,}",
    }
    if original := case.get("original_code"):
        row["original code, CPU s (recorded elsewhere)"] = original["cpu_seconds"]
    return row


def _eap(found: Results) -> Tables:
    yield "", [_attribution(case["case"], case, case["tokens"]) for case in found["cases"]]


def _attribution(name: str, case: Results, tokens: Sequence[int]) -> dict[str, object]:
    row: dict[str, object] = {
        "case": name,
        "prompts": tokens[0],
        "tokens": tokens[1],
        "edges": f"{case['edges']:,}",
    }
    for program, seconds in case["seconds"].items():
        row[f"{program}, s"] = _times(seconds)
    row |= {
        f"{program} / floor": f"{ratio:.2f}"
        for program, ratio in case["over_floor"].items()
        if program != "floor"
    }
    measured = [each for each in case.get("memory", []) if each["peak"] is not None]
    if measured:
        share = max(each["peak"] / each["max_memory"] for each in measured)
        row["peak / max_memory, at most"] = f"{share:.2f}"
    return row


def _eap_peers(found: Results) -> Tables:
    rows: Rows = []
    for name, peer in found["peers"].items():
        if "failed" in peer:
            rows.append({"package": name, "version": f"failed: {peer['failed'][-1]}"})
            continue
        row: dict[str, object] = {
            "package": name,
            "version": peer["versions"][name],
            "edges": f"{peer['edges']['shared']:,}",
        }
        row |= {f"{who}, s": _times(seconds) for who, seconds in peer["seconds"].items()}
        ours, theirs = peer["seconds"].values()
        row["theirs / ours"] = _speedup(theirs, ours)
        rows.append(
            {
                **row,
                "largest difference / largest score": _small(
                    peer["largest_difference_over_largest_score"]
                ),
            }
        )
    yield f"{found['shape']}, {found['prompts']} prompts of 16 tokens.", rows


def _scaling(found: Results) -> Tables:
    yield from _sizes(found["points"], _clock(found))


def _sizes(points: Sequence[Results], clock: str) -> Tables:
    for varied in ("layers", "prompts", "tokens"):
        through = [point for point in points if varied in point["varied"]]
        yield (
            f"By {varied}:",
            [_size(point, clock) for point in sorted(through, key=lambda point: point[varied])],
        )


def _size(point: Results, clock: str) -> dict[str, object]:
    row: dict[str, object] = {
        name: f"{point[name]:,}" for name in ("layers", "edges", "prompts", "tokens")
    }
    row["kept"] = f"{point['kept'] / point['edges']:.0%}"
    for method, clocks in point["seconds"].items():
        memory = point["memory"][method]
        row |= {
            f"{method}, {UNITS[clock]}": _times(clocks[clock]),
            f"{method}, MB": f"{memory['peak'] / 1e6:.0f}",
        }
        limited = memory["peak_with_max_memory"]
        row[f"{method}, MB (max_memory {memory['max_memory'] / 1e6:.0f})"] = (
            "refused" if limited is None else f"{limited / 1e6:.0f}"
        )
    return row


def _gpu_suite(found: Results) -> Tables:
    size, parts = found["config"], found["parts"]
    yield f"{size['shape']}, {size['prompts']} prompts of 16 tokens.", []
    checks = {
        name: part
        for name, part in parts.items()
        if not {"seconds", "points", "precisions"} & part.keys() or NOTHING & part.keys()
    }
    yield "", [{"part": name, "found": _checked(part)} for name, part in checks.items()]
    clock = _clock(found)
    searches = [(name, parts[f"exact ACDC, {name}"]) for name in ("some edges", "all edges")]
    yield (
        "",
        [
            _search(name, part, clock)
            for name, part in searches
            if "incremental" in part.get("seconds", ())
        ],
    )
    if "record" in (whole := parts["exact ACDC, all edges"]):
        yield "", [_whole_search(whole)]
    if "precisions" in (part := parts["mixed precision"]):
        yield (
            f"Exact ACDC in mixed precision, {part['edges']:,} edges being tried.",
            [_precision(*row) for row in part["precisions"].items()],
        )
    if "seconds" in (part := parts["EAP against its floor"]):
        yield "", [_attribution("EAP", part, (part["prompts"], 16))]
    yield from _sizes(parts["scaling"]["points"], clock) if "points" in parts["scaling"] else ()


def _whole_search(part: Results) -> dict[str, object]:
    """The search over all edges, which runs once."""
    row: dict[str, object] = {
        name: f"{part[name]:,}" for name in ("edges", "prompts", "tokens", "kept")
    }
    row |= {
        "exact ACDC, s": f"{part['seconds']['wall']:.1f}",
        "CPU s": f"{part['seconds']['cpu']:.1f}",
    }
    row |= {"peak, MB": f"{part['peak'] / 1e6:.0f}"} if part["peak"] else {}
    row |= {name: f"{part['record'][name]:,}" for name in ("evaluations", "batches")}
    return (
        {**row, "replayed by the reference": _checked(part["replayed"])}
        if "replayed" in part
        else row
    )


def _precision(name: str, row: Results) -> dict[str, object]:
    """Exact ACDC with one background type; simulated rounding has no meaningful time."""
    seconds = _times(row["seconds"]) if row["kernel"] else "simulated"
    row = {
        "decisions that differ": row["decisions_that_differ"],
        "measured": row["measured"],
        "of these in float32 too": row["confirmed"] or "",
    }
    return {"type": name, "exact ACDC, s": seconds, **row}


def _checked(part: Results) -> str:
    """What a part found, or why it found nothing."""
    for why in NOTHING & part.keys():
        return f"{why}: {part[why] if isinstance(part[why], str) else part[why][-1]}"
    if "largest_differences" in part:
        return (
            f"logits differ by {max(part['largest_differences']):.1e} at most, "
            f"the largest being {part['largest_logit']:.1f}"
        )
    if "compared" in part:
        return (
            f"of {part['compared']} decisions {part['within_band']} are within 1e-5 of the "
            f"threshold; of the others {part['different']} differ"
        )
    if "correlation" in part:
        return (
            f"scores differ by {part['largest_difference']:.1e} at most, "
            f"the largest being {part['largest_score']:.1e}"
        )
    return f"{part['decisions_that_differ']} of {part['edges']:,} decisions differ"


def _attribution_graph(found: Results) -> Tables:
    clock, tokens = _clock(found), found["tokens"]
    yield (
        f"The full graph of one prompt, every active feature a target; random cases have {tokens} "
        f"tokens.",
        [_graph_case(case, clock) for case in found["cases"]],
    )
    yield (
        "Ours alone, by prompt length and active features:",
        [_graph_alone(point, clock) for point in found["alone"]],
    )


def _graph_case(case: Results, clock: str) -> dict[str, object]:
    row: dict[str, object] = {
        "case": case["case"],
        "nodes": f"{case['nodes']:,}",
        "edges": f"{case['edges']:,}",
    }
    row["largest difference / largest edge"] = (
        f"{case['largest_difference'] / case['largest_edge']:.0e}"
    )
    row |= {
        f"{name}, {UNITS[clock]}": _times(clocks[clock]) for name, clocks in case["seconds"].items()
    }
    ours = case["seconds"]["ours"][clock]
    for name in BATCHES:
        row[f"{name} / ours"] = _speedup(case["seconds"][name][clock], ours)
    return row | {
        f"{name}, peak MB": f"{size / 1e6:.0f}"
        for name, size in case["peak_above_loaded_bytes"].items()
    }


def _graph_alone(point: Results, clock: str) -> dict[str, object]:
    row: dict[str, object] = {
        "case": point["case"],
        "tokens": point["tokens"],
        "active": f"{point['active']:.0%}",
    }
    row |= {name: f"{point[name]:,}" for name in ("features", "edges")}
    return row | {
        UNITS[clock]: f"{point['seconds'][clock]:.2f}",
        "peak MB": f"{point['peak_bytes'] / 1e6:.0f}",
    }


def _gemma_graph(found: Results) -> Tables:
    sizes = found["sizes"]
    yield (
        f"{sizes['n_layers']} layers, d_model {sizes['d_model']}, {found['features']:,} features a "
        f"layer, {found['dtype']}. "
        "The floor is the time of the products alone. In TF32, which is the user's to allow, "
        "products are less exact.",
        [
            {
                "products": "TF32" if run["allow_tf32"] else "float32",
                **{
                    name: f"{run[name]:,}"
                    for name in ("tokens", "targets", "at_a_time", "nodes", "edges")
                },
                "s": _times([each["wall"] for each in run["seconds"]]),
                "floor, s": f"{run['floor']['seconds']:.2f}",
                "peak, MB": f"{run['peak_bytes'] / 1e6:.0f}",
            }
            for run in found["runs"]
        ],
    )


def _feature_extraction(found: Results) -> Tables:
    clock = _clock(found)
    yield "", [_extraction(case, clock) for case in found["cases"]]


def _extraction(case: Results, clock: str) -> dict[str, object]:
    shape = (
        f"{case['layers']} layers of {case['features']:,} features, d_model {case['d_model']}, "
        f"{case['positions']} positions, {case['dtype']}"
    )
    row: dict[str, object] = {"case": f"{shape}, {case['case']}", "nodes": f"{case['nodes']:,}"}
    programs = case["compared_with_the_loop"]
    row |= {
        f"{program}, ms": f"{1e3 * statistics.median(case['seconds'][program][clock]):.2f}"
        for program in programs
    }
    return row | {"floor, ms": f"{1e3 * case['floor']['seconds']:.2f}"}


def _times(seconds: Sequence[float]) -> str:
    digits = 3 if statistics.median(seconds) < 1 else 2
    median, least, most = (
        f"{value:.{digits}f}" for value in (statistics.median(seconds), min(seconds), max(seconds))
    )
    return f"{median} ({least} to {most})" if len(seconds) > 1 else median


BENCHMARKS: dict[str, tuple[str, Callable[[Results], Tables]]] = {
    "exact-acdc": ("Exact ACDC", _exact_acdc),
    "eap": ("EAP against its floor", _eap),
    "eap-peers": ("EAP in other packages", _eap_peers),
    "scaling": ("Scaling", _scaling),
    "attribution-graph": ("Attribution graphs against circuit-tracer", _attribution_graph),
    "gemma-graph": ("Attribution graphs at Gemma-2-2b's shape", _gemma_graph),
    "feature-extraction": ("Feature extraction", _feature_extraction),
    "gpu-suite": ("The suite for a GPU", _gpu_suite),
}
SUMMARIZED = (
    "toy-world, IOI, 64 prompts, 0.01",
    "4 layers of 8 heads, original order, 0.01",
    "random, gpt2-small",
)
BATCHES = {"circuit-tracer": "its default batch", "circuit-tracer, batch 64": "batch 64"}
EXTRACTORS = {
    "loop, .item()": "a Python loop over layers and positions",
    "vectorised": "the same, vectorised over positions",
}
SUMMARIES: dict[str, Callable[[Results], Rows]] = {
    "exact-acdc": _searches_compared,
    "eap-peers": _eap_compared,
    "attribution-graph": _graphs_compared,
    "feature-extraction": _extraction_compared,
}
UNITS = {"wall": "s", "cpu": "CPU s"}
ON_CPU_ALONE = ("eap-peers", "attribution-graph")


if __name__ == "__main__":
    main(tyro.cli(Config))
