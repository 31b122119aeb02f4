"""The options of every command, with their help: what can be known without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from circuits.cli.parsing.methods import AblationName


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model to use, and how to load it."""

    model: str | None = None
    """toy-world (the default), a name TransformerLens knows (gpt2, pythia-160m), or a folder."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default CUDA if there is one."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Data type of the weights."""
    json: bool = False
    """Print JSON for programs instead of tables."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions(ModelOptions):
    """Which prompts to use."""

    task: str | None = None
    """The name of a task, with options after colons, such as greater_than:digits=1; `circuits list`
    shows them. By default ioi."""
    data: Path | None = None
    """Your own prompts instead of a task: a file of JSON lines, a JSON list or a table (.csv, .tsv)
    with clean, corrupted, answer and wrong_answer; EAP-IG's and MIB's data too. All prompts are
    used for discovery and for evaluation."""
    seed: int | None = None
    """Seed for drawing prompts; by default 0."""
    skip_misfits: bool = False
    """Leave out pairs of --data that do not fit the model, instead of refusing the file."""
    prepend_bos: bool | None = None
    """Begin each prompt with exactly one BOS token, or (False) take text as it is; by default as
    the model does."""


@dataclass(frozen=True, kw_only=True)
class DiscoverOptions(TaskOptions):
    """Find a circuit on prompts of the train split, and evaluate it on held-out prompts.

    $ circuits discover --method acdc --threshold 0.01 --task ioi
    $ circuits discover --method eap-ig --steps 10 --task greater_than --size 50
    $ circuits discover --method eap --data prompts.jsonl --model gpt2 --size 200
    $ circuits discover --method acdc --threshold 0.01 --start runs/ioi/eap-1a2b3c4d --start-size 99
    $ torchrun --nproc-per-node=4 -m -- circuits discover --method acdc --threshold 0.01 --n 64

    The last one shares the work among four devices. Without `--`, torchrun would take `--n` for
    one of its own options.
    """

    method: str = "acdc"
    """A method's name (`circuits list` shows them), or a Python file that defines one.
    The last options are the method's own."""
    n: int = 64
    """Number of prompts to discover on."""
    n_eval: int = 64
    """Number of held-out prompts to evaluate on."""
    size: int | None = None
    """Number of highest-scored edges to evaluate, for methods that only score."""
    split_embed: bool = False
    """Make token and position embedding two nodes."""
    positions: str | None = None
    """Split edges by span (names separated by commas, such as IO,S1,S1+1,S2,END), or by position
    (the number of positions)."""
    layers: str | None = None
    """Try only edges into heads and MLPs of these layers, such as 6-11 or 0,2-4; for methods that
    search."""
    start: Path | None = None
    """Start the search from the circuit of this run folder; edges outside it are ablated."""
    start_size: int | None = None
    """Start from that many edges of that circuit, grown from the logits by their |score|."""
    out: Path = Path("runs")
    """The folder of all runs. A run that is already there is not computed again."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TaskOptions):
    """Run a saved circuit on held-out prompts, with everything outside it ablated.

    Model, task, seed and BOS token are by default those of the run.

    $ circuits evaluate runs/ioi/acdc-1a2b3c4d --n 64
    $ circuits evaluate runs/ioi/eap-ig-1a2b3c4d --size 50 --metrics kl,accuracy
    """

    circuit: Positional[Path]
    """A run folder."""
    n: int = 64
    """Number of held-out prompts."""
    size: int | None = None
    """Number of highest-scored edges to keep; by default the circuit as it is."""
    metrics: str | None = None
    """Metrics separated by commas; by default kl, logit_difference and the task's own."""
    ablation: AblationName | None = None
    """What edges outside the circuit carry; by default what they carried in the search."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(TaskOptions):
    """Discover with several methods on the same prompts, and evaluate them on the same others.

    $ circuits compare --task ioi --methods acdc,eap,eap-ig,random
    $ circuits compare --task docstring --methods acdc:threshold=0.02,eap:gradient_at=both --n 32
    $ circuits compare --task two_hop --methods acdc,attribution-graph:transcoders=toy-world-clt
    """

    methods: str = "acdc,eap,eap-ig,random"
    """Methods separated by commas, with settings after colons:
    acdc:threshold=0.02:order=original,eap."""
    n: int = 16
    """Number of prompts to discover on."""
    n_eval: int = 64
    """Number of held-out prompts to evaluate on."""
    thresholds: str = "0.002,0.005,0.01,0.03,0.1"
    """Thresholds to try for methods that take one and are given none; the table shows the
    first."""
    size: int | None = None
    """Number of edges for methods that only score; by default as many as the first selecting
    method keeps."""
    ablation: AblationName = "resample"
    """What ablated edges carry, in methods that have the choice and in the evaluation."""
    out: Path = Path("runs")
    """The folder of all runs and of the report."""


@dataclass(frozen=True, kw_only=True)
class GraphOptions(ModelOptions):
    """Compute which features, at which positions, made the model say this: an attribution graph.

    The run folder gets a page to explore the graph.

    $ circuits graph "The capital of the state containing Dallas is"
    $ circuits graph "The capital of Texas is" --explain " Austin" --transcoders toy-world-plt
    $ circuits graph "Fact: the" --model gpt2 --transcoders my_set --budget 5000 --neuronpedia
    """

    prompt: Positional[str]
    """The prompt's text."""
    transcoders: str | None = None
    """A folder, a hub address (hf://owner/name), or embedded ones: toy-world-plt,
    toy-world-skip-plt, toy-world-clt (the default for toy-world)."""
    explain: str | None = None
    """The token to explain, with its leading space if it has one in the text; two tokens
    separated by / explain their difference. By default the most probable next tokens."""
    budget: int | None = None
    """Number of features that get incoming edges, the most influential ones; by default all."""
    node_threshold: float = 0.8
    """Share of the influence that the nodes shown at first have."""
    edge_threshold: float = 0.98
    """Share of the influence between these nodes that the edges shown at first have."""
    leading: int = 1
    """Number of first positions without features (beginning-of-sequence tokens)."""
    prepend_bos: bool | None = None
    """Begin the prompt with exactly one BOS token, or (False) take it as it is; by default as the
    model does."""
    neuronpedia: bool = False
    """Write the pruned graph as Neuronpedia's JSON, too."""
    out: Path = Path("runs")
    """The folder of all runs. A graph that is already there is not computed again."""


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Explore a run folder's attribution graph in the browser, whatever its size. Ctrl-C ends it.

    $ circuits view runs/graphs/the-capital-of-the-state-1a2b3c4d
    $ circuits view my_graph --port 8123 --no-browser

    Only this machine can open the page, but all of its users can. Pinned nodes and supernodes are
    kept in the folder, in groups.json.
    """

    folder: Positional[Path]
    """The folder that holds graph.safetensors."""
    port: int = 8000
    """Port of the page's address; 0 chooses a free one."""
    browser: bool = True
    """Open the page in the browser."""


@dataclass(frozen=True, kw_only=True)
class ListOptions(ModelOptions):
    """List methods, tasks, metrics, ablations and embedded transcoders.

    $ circuits list
    $ circuits list --model gpt2

    Of a model, list how well it does every task by itself: its accuracy, and by how much it prefers
    right answers to wrong ones.
    """

    n: int = 32
    """Number of prompts of each task, where a model is given."""
