"""What is inside the run of a circuit: outputs of nodes, attention patterns, residual streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.graph.nodes import Node
from circuits.models import Model, frozen, hook_names, separate_inputs, shape_of
from circuits.models.component_graph import component_nodes
from circuits.models.running import INSTEAD
from circuits.running.ablation import Ablation
from circuits.running.edge_layout import check_runnable
from circuits.running.hooked import HookedExecutor
from circuits.running.run import parts_that_fit
from circuits.running.settings import RunSettings
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.messages import suggestion
from circuits.system.numbers import WholeNumber, items
from circuits.system.torch_modes import without_modes
from circuits.tasks.task import Task

Activations = dict[str, Tensor]
Seen = dict[str, list[Tensor]]
Rows = dict[str, int]


@without_modes()
def circuit_activations(
    model: Model,
    circuit: Circuit,
    task: Task,
    names: Sequence[str | Node] | str | Node,
    *,
    ablation: str | Ablation = "resample",
    max_memory: WholeNumber | None = None,
) -> Activations:
    """Activations inside the run of a circuit, in which every edge outside it is ablated.

    The clean prompts run, by the reference executor. A node writes its output whether the circuit
    keeps its edges or not; what a target reads, after ablation, is at its input's hook point
    (`blocks.1.hook_q_input`, `blocks.1.hook_mlp_in`). The residual stream between them,
    such as `blocks.1.hook_resid_mid`, is the sum of what has been written so far; at the last
    layer's `hook_resid_post` it is what the logits read.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> circuit = circuits.EAP().discover(model, task).top(50)
    >>> pattern = "blocks.1.attn.hook_pattern"
    >>> found = circuits.circuit_activations(model, circuit, task, ["a1.h0", pattern])
    >>> found["a1.h0"].shape == (*task.clean.shape, model.cfg.d_model)
    True
    >>> found[pattern].shape[:2]  # [prompt head query key]
    torch.Size([4, 4])

    Args:
        names: sources of the circuit's graph ("a1.h0", "m2", "embed", or nodes), whose outputs
            these are, [prompt pos d_model]: of a head without b_O, which belongs to no node; or
            hook points of TransformerLens ("blocks.1.attn.hook_pattern").
        ablation, max_memory: see `run_circuits`.

    Returns:
        Under each name a tensor on the model's device, with the shape that TransformerLens gives
        it, except that shared key and value heads are repeated for every head. At padding it holds
        numbers that mean nothing, and that no real token reads; `task.mask` is False there.

    Raises:
        InputError: a name is unknown, or is not computed once in such a run; the circuit is one of
            features; or the model, circuit and task do not fit together.
    """
    check_is_circuit(circuit)
    graph = circuit.graph
    if "hooks" not in graph.executors:
        raise InputError(
            "this circuit is one of transcoder features; give a circuit of heads and MLPs."
        )
    check_runnable(model, graph, task)
    wanted = [names] if isinstance(names, str | Node) else items(names, "names")
    for name in wanted:
        expect(name, str | Node, "a name or a node", "write it like 'a1.h0'")
    distinct = dict.fromkeys(map(str, wanted))
    texts = list(distinct)
    nodes = component_nodes(model, graph.splits_embedding)
    rows = {str(node): row for row, node in enumerate(nodes)}
    _check_names(model, texts, rows)
    settings = RunSettings.parse(ablation=ablation, executor="hooks", max_memory=max_memory)
    parts: list[Activations] = []
    for own_graph, part, own_settings in parts_that_fit(model, graph, task, settings):
        ablation, limit = own_settings.ablation, own_settings.max_memory
        executor = HookedExecutor.prepare(model, own_graph, part, ablation, max_memory=limit)
        parts += _of_parts(executor, circuit, texts, rows)
    return {text: torch.cat([part[text] for part in parts]) for text in texts}


def _check_names(model: Model, texts: Sequence[str], rows: Rows) -> None:
    known = [*rows, *hook_names(model)]
    for text in texts:
        if text not in known:
            first, *_, last = rows
            there_are = (
                f"there are its sources, {first} to {last}, and hook points such as "
                "blocks.0.attn.hook_pattern."
            )
            similar = suggestion(text, known, otherwise=there_are)
            raise InputError(f"{text!r} is no activation of this circuit's run; {similar}")


def _of_parts(
    executor: HookedExecutor, circuit: Circuit, texts: Sequence[str], rows: Rows
) -> Iterator[Activations]:
    """The activations on the executor's prompts, as many at a time as fit into memory."""
    model = executor.model
    hooks = [text for text in texts if text not in rows]
    kept = circuit.kept[None].to(shape_of(model).device)
    ablated = executor.layout.ablated(kept)
    for prompts in executor.parts():
        seen: Seen = {hook: [] for hook in hooks}
        observers = [(hook, seen[hook].append) for hook in hooks]
        with frozen(model), torch.no_grad(), separate_inputs(model):
            outputs, _ = executor.run(prompts, ablated, observers)
        # Copies, so that the outputs of the other sources are not kept.
        found = {text: outputs[rows[text], 0].clone() for text in texts if text in rows}
        yield found | {hook: _only(hook, seen[hook]) for hook in hooks}


def _only(hook: str, seen: Sequence[Tensor]) -> Tensor:
    if len(seen) == 1:
        return seen[0]
    raise InputError(f"{hook!r} is computed for q, k and v each; {INSTEAD}.")
