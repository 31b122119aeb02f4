"""Whatever happens to a file that a user hands over, it is read as it was or refused in one line.

A kind of file is one entry of `KINDS`. For more than the few mutations of the suite:

    python tests/test_fuzz.py 2000
"""

import copy
import json
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_model, random_task
from random_transcoders import random_transcoders
from synthetic_feature_graph import synthetic_graph
from transformers import GPT2Config, GPT2LMHeadModel

import circuits
from circuits.models.loading.saved import parts_of
from circuits.runs.circuit_run import METRICS, RECORD, evaluate_run, load_run, run
from circuits.runs.graph_run import load_graph_run

SECONDS, LONGEST = 20, 500
IN_SUITE = 12  # mutations of each kind
MODEL = random_model("gpt2", d_vocab=700)
TASK = random_task()


@dataclass(frozen=True)
class Kind:
    """A kind of file: how it is made in a folder, how it is read, and what was read.

    Attributes:
        make: writes the file, and what else is needed, into a folder; returns the file's path.
        load: reads it from its path.
        seen: what was read, in a form that `==` compares; None if the file has no digest, so that
            another number cannot be told from the one that was written.
    """

    make: Callable[[Path], Path]
    load: Callable[[Path], Any]
    seen: Callable[[Any], Any] | None


def numbers(*tensors: torch.Tensor) -> list[Any]:
    return [(str(each.dtype), each.shape, each.numpy().tobytes()) for each in tensors]


def of_circuit(circuit: circuits.Circuit) -> Any:
    graph = circuit.graph
    columns = numbers(circuit.scores, circuit.kept, graph.source, graph.target, graph.slot)
    return columns, graph.nodes, graph.model, circuit.selected, circuit.record


def of_feature_graph(graph: circuits.FeatureGraph) -> Any:
    columns = [each for each in vars(graph).values() if isinstance(each, torch.Tensor)]
    return numbers(*columns, *vars(graph.nodes).values()), graph.words, graph.settings


def of_transcoders(transcoders: circuits.Transcoders) -> Any:
    encoders = transcoders.encoders
    tensors = [each for one in encoders for each in (one.weight, one.bias)]
    activations = [str(encoder.activation) for encoder in encoders]
    return numbers(*tensors, *transcoders.decoders), transcoders.reads, activations


def of_model(model: Any) -> Any:
    tokens = None if model.tokenizer is None else model.tokenizer("Mary went", verbose=False)
    return numbers(*model.state_dict().values()), str(model.cfg), str(tokens)


def saved_run(folder: Path, name: str) -> Path:
    found = run(circuits.EAP(), MODEL, TASK, out=folder)
    evaluate_run(found, MODEL, TASK, size=5)
    return found.folder / name


def evaluated(path: Path) -> Any:
    return evaluate_run(load_run(path.parent), MODEL, TASK, size=5)


def graph_run(folder: Path, name: str) -> Path:
    toy = circuits.load_model("toy-world", device="cpu")
    method = circuits.AttributionGraph("toy-world-plt", budget=20)
    return circuits.run_graph(method, toy, "Mary went", out=folder).folder / name


def saved_model(folder: Path, name: str) -> Path:
    toy = circuits.load_model("toy-world", device="cpu")
    circuits.save_model(circuits.build_model(*parts_of(MODEL), toy.tokenizer), folder)
    return folder / name


def checkpoint_of_transformers(folder: Path, name: str) -> Path:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=673, n_positions=16, n_ctx=16)
    saved_model(folder, name)
    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder / name


def checkpoint(folder: Path) -> Path:
    path = folder / "checkpoint.safetensors"
    circuits.ACDC(0.02).discover(MODEL, TASK, checkpoint=path)
    return path


def written(text: Callable[[], str], name: str, folder: Path) -> Path:
    path = folder / name
    path.write_text(text())
    return path


PROMPTS = "\n".join(
    json.dumps({"clean": f"Mary went {word}", "corrupted": f"John went {word}", "answer": " is"})
    for word in ("to", "is", "of")
)
JSON_OF = {
    "neuronpedia": lambda folder: circuits.save_neuronpedia(
        synthetic_graph(), folder / "graph.json", slug="a"
    ),
    "eap-ig": lambda folder: circuits.save_eap_ig(
        circuits.EAP().discover(MODEL, TASK), folder / "graph.json"
    ),
}
TRANSCODERS = partial(circuits.load_transcoders, device="cpu")


def saved_transcoders(folder: Path, name: str) -> Path:
    return circuits.save_transcoders(random_transcoders(MODEL), folder) / name


def load_parent(load: Callable[[Path], Any], path: Path) -> Any:
    return load(path.parent)


load_model = partial(load_parent, partial(circuits.load_model, device="cpu"))
KINDS = {
    "circuit": Kind(
        partial(saved_run, name="circuit.safetensors"), circuits.Circuit.load, of_circuit
    ),
    "record": Kind(
        partial(saved_run, name=RECORD),
        lambda path: load_run(path.parent),
        lambda found: (found.record, found.model_runs, of_circuit(found.circuit)),
    ),
    "metrics": Kind(partial(saved_run, name=METRICS), evaluated, dict),
    "feature graph": Kind(
        partial(graph_run, name="graph.safetensors"), circuits.FeatureGraph.load, of_feature_graph
    ),
    "record of a graph": Kind(
        partial(graph_run, name=RECORD),
        lambda path: load_graph_run(path.parent),
        lambda found: (found.record, found.details),
    ),
    "transcoders": Kind(
        partial(saved_transcoders, name="layer_1.safetensors"),
        partial(load_parent, TRANSCODERS),
        of_transcoders,
    ),
    "config.yaml": Kind(
        partial(saved_transcoders, name="config.yaml"),
        partial(load_parent, TRANSCODERS),
        of_transcoders,
    ),
    "model": Kind(partial(saved_model, name="model.safetensors"), load_model, of_model),
    "model's config": Kind(partial(saved_model, name="config.json"), load_model, of_model),
    "tokenizer": Kind(partial(saved_model, name="tokenizer.json"), load_model, of_model),
    "tokenizer's config": Kind(
        partial(saved_model, name="tokenizer_config.json"), load_model, of_model
    ),
    "checkpoint": Kind(
        checkpoint,
        lambda path: circuits.ACDC(0.02).discover(MODEL, TASK, checkpoint=path),
        lambda circuit: of_circuit(circuit)[0],
    ),
    "checkpoint of transformers": Kind(
        partial(checkpoint_of_transformers, name="config.json"), load_model, None
    ),
    "prompts": Kind(
        partial(written, lambda: PROMPTS, "prompts.jsonl"),
        lambda path: circuits.Task.from_jsonl(path, circuits.load_model("toy-world", device="cpu")),
        None,
    ),
    "neuronpedia": Kind(JSON_OF["neuronpedia"], circuits.load_neuronpedia, None),
    "eap-ig": Kind(JSON_OF["eap-ig"], lambda path: circuits.load_eap_ig(path, MODEL), None),
}


def without_digest(path: Path) -> Path:
    """The file as earlier versions wrote it."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        del header["__metadata__"]["digest"]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
        if path.name == "model.safetensors":
            without_digest(path.with_name("config.json"))
    elif path.suffix == ".json":
        entries = json.loads(content)
        kept = {key: value for key, value in entries.items() if not key.startswith("digest")}
        path.write_text(json.dumps(kept, indent=2))
    else:
        path.write_bytes(content.partition(b"\n")[2])
    return path


def before(kind: Kind) -> Kind:
    return Kind(lambda folder: without_digest(kind.make(folder)), kind.load, None)


KINDS |= {
    f"{name}, before": before(kind)
    for name, kind in KINDS.items()
    if kind.seen and "token" not in name
}

# What stands in JSON, and should not.
VALUES = [
    None, True, -1, 0, 3, 10**7, 1.5, 1e308, -1e400, float("nan"), 10**30, 2**63, "", "é" * 1000,
    "\0", [], {}, [[]], {"a": None}, [1, "a"], "1",
]  # fmt: skip


def changed_json(content: Any, dice: random.Random) -> Any:
    """The content with one entry replaced, left out, renamed or added, at any depth."""
    places = [(content, key) for key in _keys(content)]
    for holder, key in places:
        places += [(holder[key], inner) for inner in _keys(holder[key])][:50]
    if not places:
        return dice.choice(VALUES)
    holder, key = dice.choice(places)
    value = dice.choice(VALUES)
    if dice.random() < 0.2 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif dice.random() < 0.2:
        del holder[key]
    else:
        holder[key] = value
    return content


def _keys(value: Any) -> list[Any]:
    return (
        list(value)
        if isinstance(value, dict)
        else list(range(len(value)))
        if isinstance(value, list)
        else []
    )


def mutated_json(content: bytes, dice: random.Random) -> bytes:
    lines = content.split(b"\n")
    number = dice.randrange(len(lines))
    try:
        return json.dumps(changed_json(json.loads(content), dice)).encode()
    except ValueError:
        pass
    try:
        lines[number] = json.dumps(changed_json(json.loads(lines[number]), dice)).encode()
    except ValueError:
        # A line such as "key: value" of YAML.
        key = lines[number].partition(b":")[0]
        lines[number] = key + b": " + json.dumps(dice.choice(VALUES)).encode()
    return b"\n".join(lines)


def mutated_header(content: bytes, dice: random.Random) -> bytes:
    """A safetensors file with another header: its dtypes, shapes, offsets and metadata."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = dice.choice(list(header))
    if name == "__metadata__" or dice.random() < 0.3:
        header = changed_json(header, dice)
    else:
        key, values = dice.choice(
            [
                ("dtype", ["F32", "BF16", "I64", "F64", "BOOL", "F8_E4M3", "X", "C64"]),
                ("shape", [[], [1], [-1], [2**62, 4], [0], header[name]["shape"][::-1]]),
                ("data_offsets", [[0, 0], [4, 2], [0, 2**63]]),
            ]
        )
        header[name][key] = dice.choice(values)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def flipped(content: bytes, dice: random.Random, n: int = 1) -> bytes:
    changed = bytearray(content)
    for _ in range(n):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def inserted(content: bytes, dice: random.Random) -> bytes:
    start, size = dice.randrange(len(content)), dice.choice([1, 8, 1000])
    return content[:start] + dice.randbytes(size) + content[start:]


def cut_out(content: bytes, dice: random.Random) -> bytes:
    start, size = dice.randrange(len(content)), dice.choice([1, 8, 1000])
    return content[:start] + content[start + size :]


def zeroed(content: bytes, dice: random.Random) -> bytes:
    start, size = dice.randrange(len(content)), dice.choice([1, 8, 512])
    return (content[:start] + bytes(size) + content[start + size :])[: len(content)]


def digit_changed(content: bytes, dice: random.Random) -> bytes:
    places = [place for place, byte in enumerate(content[:100_000]) if byte in b"0123456789"] or [0]
    changed = bytearray(content)
    changed[dice.choice(places)] = ord(dice.choice("0123456789"))
    return bytes(changed)


def key_doubled(content: bytes, dice: random.Random) -> bytes:
    place = content.find(b"{") + 1
    return content[:place] + b'"format": 1, "format": 1, "digest": "a", ' + content[place:]


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flipped,
    partial(flipped, n=20),
    inserted,
    cut_out,
    zeroed,
    digit_changed,
    key_doubled,
    lambda content, dice: content[: dice.randrange(len(content))],
    lambda content, dice: b"",
    lambda content, dice: b"[" * 100_000,
    lambda content, dice: b'{"a":' * 100_000,
    lambda content, dice: dice.randbytes(1000),
    lambda content, dice: content + content,
    mutated_json,
    mutated_json,
    mutated_json,
]


def mutate(path: Path, original: bytes, dice: random.Random) -> str:
    """Change a file in some way; say how."""
    if dice.random() < 0.03:
        path.unlink()
        if dice.random() < 0.5:
            path.mkdir()
        return "a folder or nothing"
    if dice.random() < 0.03:
        path.write_bytes(original)
        path.chmod(0)
        return "no permission"
    mutation = dice.choice(MUTATIONS)
    if path.suffix == ".safetensors" and mutation is mutated_json:
        mutation = mutated_header
    path.write_bytes(mutation(original, dice))
    return getattr(mutation, "__name__", "flipped")


def restore(path: Path, original: bytes) -> None:
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(original)


def problem(kind: Kind, path: Path, expected: Any) -> str:
    """What is wrong with how a changed file is read; empty if nothing is."""
    try:
        found = kind.load(path)
    except circuits.InputError as error:
        line = str(error)
        return f"{len(line)} characters: {line}" if len(line) > LONGEST or "\n" in line else ""
    except Exception:
        return traceback.format_exc()
    if kind.seen is not None and kind.seen(found) != expected:
        return "another content was read"
    return ""


def too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def problems(name: str, folder: Path, n: int, seed: int = 0) -> list[str]:
    """Mutate a kind of file `n` times; return what went wrong, with the number of the mutation."""
    kind = KINDS[name]
    path = kind.make(folder)
    unchanged = kind.load(path)
    expected = kind.seen and copy.deepcopy(kind.seen(unchanged))
    original = path.read_bytes()
    found = []
    for number in range(seed, seed + n):
        how = mutate(path, original, random.Random(f"{name} {number}"))
        signal.signal(signal.SIGALRM, too_slow)
        signal.alarm(SECONDS)
        try:
            wrong = problem(kind, path, expected)
        finally:
            signal.alarm(0)
        if wrong:
            found.append(f"{name} {number} ({how}): {wrong}")
        restore(path, original)
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_changed_file_is_read_as_it_was_or_refused_in_one_line(name, tmp_path, unchecked_types):
    assert problems(name, tmp_path, IN_SUITE) == []


if __name__ == "__main__":
    import tempfile
    import warnings

    warnings.simplefilter("ignore")
    names = sys.argv[2:] or list(KINDS)
    counts: Counter[str] = Counter()
    for each in names:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as where:
            wrong_ones = problems(each, Path(where), int(sys.argv[1]) // len(names))
        seconds = time.perf_counter() - started
        total = int(sys.argv[1]) // len(names)
        report = f"{each}: {len(wrong_ones)} wrong of {total}, {seconds:.1f} s"
        sys.stdout.write("\n    ".join([report, *(one[-1500:] for one in wrong_ones[:6]), ""]))
