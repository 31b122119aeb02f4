"""The contract: under every condition, a registered method finds what it finds in a plain run.

Each condition gives two runs that must agree. What differs between them is a share of all |score|.
"""

import functools
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from architectures import random_model, random_task, weight as model_weight
from several_ranks import on_two_ranks
from test_discoverers import REQUIRED

import circuits
from circuits.discovery.discoverer import SPEED_ONLY, CircuitDiscoverer
from circuits.discovery.gradients.edge_scores import GradientPoint
from circuits.discovery.gradients.gradient_method import GradientMethod
from circuits.models import HAS_HOOKED_TRANSFORMER
from circuits.models.propagation import PropagationRules
from circuits.system.ranks import ranks, start
from circuits.tasks.task import Task

# Many models and methods: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")


@dataclass(frozen=True)
class TwoPoints(GradientMethod):
    """A user's gradient method.

    Reference: none; an example.

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead.
        max_memory: bytes that a run may take.
    """

    name: ClassVar[str] = "two-points"

    def points(self, nodes):
        return [GradientPoint(0.3), GradientPoint(0.8)]

    @property
    def rules(self):
        return PropagationRules(attention="constant")


@dataclass(frozen=True)
class LeaveOneOut(CircuitDiscoverer):
    """A user's search: keep the edges without which the damage is larger.

    Reference: none; an example.

    Attributes:
        metric: what damage is measured in.
        max_memory: bytes that a step may take.
    """

    name: ClassVar[str] = "leave-one-out"
    metric: str | circuits.Metric = "kl"
    max_memory: int | None = field(default=None, metadata=SPEED_ONLY)

    def find(self, model, task, graph, saved, progress):
        without_one = ~torch.eye(len(graph), dtype=torch.bool)
        scores = self.meter(model, graph, task)(without_one)
        return circuits.Circuit(graph, scores, scores > 0.01, record=self.record())


OF_FEATURES = "attribution-graph"
SETTINGS = {**REQUIRED, OF_FEATURES: {"transcoders": "toy-world-plt", "kept_only": True}}
METHODS: dict[str, Any] = {
    name: method(**SETTINGS.get(name, {}))
    for name, method in circuits.discoverers().items()
    if method.__module__.startswith("circuits.") or method in (TwoPoints, LeaveOneOut)
}


@functools.cache
def model_for(name: str, dtype: torch.dtype = torch.float32):
    """Transcoders come with toy-world; all else is tried on a smaller model."""
    if name == OF_FEATURES:
        return circuits.load_model("toy-world", device="cpu", dtype=dtype)
    return random_model("gpt2", n_heads=2, d_head=12, dtype=dtype)


@functools.cache
def task_for(name: str) -> Task:
    """Ragged prompts, of which the components' model is scored at several positions."""
    if name == OF_FEATURES:
        return circuits.load_task("ioi", model_for(name), n=2)
    return random_task(batch=4, ragged=True, several=True)


def run(name: str, model=None, task: Task | None = None, **settings: Any) -> circuits.Circuit:
    model = model_for(name) if model is None else model
    task = task_for(name) if task is None else task
    return replace(METHODS[name], **settings).discover(model, task)


plain = functools.cache(run)
Runs = tuple[circuits.Circuit, circuits.Circuit]


def settings_of(name: str) -> set[str]:
    return {each.name for each in fields(METHODS[name])}


def with_little_memory(name: str, **settings: Any) -> circuits.Circuit:
    """One circuit at a time; a gradient method says what one prompt needs."""
    if "max_memory" not in settings_of(name):
        return run(name, **settings)
    # One target at a time takes the attribution graph too long.
    max_memory = 1 << 20 if name == OF_FEATURES else 1
    try:
        return run(name, max_memory=max_memory, **settings)
    except circuits.InputError as error:
        (smallest,) = re.findall(r"may need up to ([\d,]+) bytes", str(error))
        return run(name, max_memory=int(smallest.replace(",", "")), **settings)


def one_prompt(name: str) -> Runs:
    """Scores are means over rows: a prompt alone counts the same as thrice."""
    task = task_for(name)
    return run(name, task=task[[0, 0, 0]]), run(name, task=task[[0]])


def ragged(name: str) -> Runs:
    """What is behind a prompt's end does not count."""
    task = task_for(name)

    longer = functools.partial(torch.nn.functional.pad, pad=(0, 2))
    clean, corrupted = (
        longer(tokens.where(task.mask, 5), value=7) for tokens in (task.clean, task.corrupted)
    )
    spans = {span: longer(mask) for span, mask in task.positions.items()}
    scored = longer(task.scored)
    padded = replace(task, clean=clean, corrupted=corrupted, scored=scored, positions=spans)
    return plain(name), run(name, task=padded)


def little_memory(name: str) -> Runs:
    return plain(name), with_little_memory(name)


def own_metric(name: str) -> Runs:
    """A metric that holds answers by prompt and by row is that of a task which has them."""
    if "metric" not in settings_of(name):
        return plain(name), run(name)
    right, wrong = task_for(name).answers, task_for(name).row_wrong_answers

    def values(logits, clean_logits, task):
        logits -= logits.mean(-1, keepdim=True)  # it may write to what it is given
        return logits.gather(1, right[task.row_prompt]).mean(1) - logits.gather(1, wrong)[:, 0]

    own = circuits.Metric("own", values, "lower_is_damage")
    return run(name, metric="logit_difference"), with_little_memory(name, metric=own)


def hook(name: str, where: str, weight: str) -> Runs:
    """A user's hook that halves an activation is a model with half the weights that read it."""
    other = deepcopy(model_for(name))
    model_weight(other, weight).div_(2)
    with model_for(name).hooks(fwd_hooks=[(where, lambda value, hook: value / 2)]):
        return run(name, other), run(name)


def inference_mode(name: str) -> Runs:
    with torch.inference_mode():
        return plain(name), run(name)


def in_dtype(name: str, dtype: torch.dtype) -> Runs:
    return plain(name), run(name, model_for(name, dtype))


# Each with how much of all |score| may differ. In bfloat16 an activation has 8 bits, so scores are
# off by some percent of the largest, and small ones by more than their size.
CONDITIONS: dict[str, tuple[Callable[[str], Runs], float]] = {
    "one prompt": (one_prompt, 1e-4),
    "ragged prompts": (ragged, 1e-4),
    "little memory": (little_memory, 1e-4),
    "a metric of one's own": (own_metric, 1e-4),
    "a hook in the middle": (
        functools.partial(hook, where="blocks.0.mlp.hook_post", weight="blocks.0.mlp.W_out"),
        1e-3,
    ),
    "a hook at the final norm": (
        functools.partial(hook, where="ln_final.hook_normalized", weight="ln_final.w"),
        1e-3,
    ),
    "inference mode": (inference_mode, 1e-4),
    "float64": (functools.partial(in_dtype, dtype=torch.float64), 1e-3),
    "bfloat16": (functools.partial(in_dtype, dtype=torch.bfloat16), 0.1),
}


# A bridge is not run through these.
OF_HOOKED_TRANSFORMERS = ("a hook in the middle", "a hook at the final norm")


def scores_of(circuit: circuits.Circuit) -> dict[str, float]:
    """By edge; what was never scored, or is no edge in the other run, counts as 0."""
    scores = circuit.scores.nan_to_num().double().tolist()
    return dict(zip(map(str, circuit.graph.edges), scores, strict=True))


def share_that_differs(found: circuits.Circuit, expected: circuits.Circuit) -> float:
    ours, theirs = scores_of(found), scores_of(expected)
    total = sum(map(abs, theirs.values()))
    assert total > 0
    edges = ours.keys() | theirs.keys()
    return sum(abs(ours.get(edge, 0) - theirs.get(edge, 0)) for edge in edges) / total


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_finds_the_same_under(condition, name):
    runs, tolerance = CONDITIONS[condition]
    if not HAS_HOOKED_TRANSFORMER and condition in OF_HOOKED_TRANSFORMERS:
        with pytest.raises(circuits.InputError, match="run of a circuit does not compute"):
            runs(name)
        return
    if (name, condition) == (OF_FEATURES, "a hook at the final norm"):
        # It is computed from weights, which do not say what the hook does.
        with pytest.raises(circuits.InputError, match="not what its weights say"):
            runs(name)
        return
    expected, found = runs(name)
    assert share_that_differs(found, expected) <= tolerance


def save_each(folder: Path) -> None:
    """What every method finds on this rank."""
    with start():
        for each in METHODS:
            run(each).save(folder / str(ranks().rank) / each)


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory, new_process) -> Path:
    """The folder in which each rank has saved its circuits."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(new_process, save_each, folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_find_the_same(of_two_ranks, name):
    first, second = (circuits.Circuit.load(of_two_ranks / rank / name) for rank in "01")
    assert first == second
    assert share_that_differs(first, plain(name)) <= 1e-4
