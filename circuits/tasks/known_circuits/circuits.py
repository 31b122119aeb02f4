"""Known circuits: hand-wired transformers, each with a task and the true edges of its circuit.

The edges are true by construction (see `wiring`), so finding them is evidence that a method is
right. Not every true edge can be found: resampling changes nothing where a node's output is the
same in every prompt, and ablating one edge shows nothing where another does the same work.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from circuits.models import Model, build_model
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.messages import suggestion
from circuits.system.numbers import RealNumber, WholeNumber, whole
from circuits.system.randomness import random_generator
from circuits.tasks.known_circuits.recipes import RECIPES, Edges
from circuits.tasks.known_circuits.wiring import rotated
from circuits.tasks.task import Task

# The attention score of an attended position minus that of the others.
SHARP, SOFT = 20.0, 5.0


@dataclass(frozen=True, eq=False)
class KnownCircuit:
    """A model, a task, and the true circuit that solves it.

    >>> import circuits
    >>> known = circuits.known_circuit("and", n_prompts=4)
    >>> graph = circuits.component_graph(known.model, split_embed=True)
    >>> len(graph), len(known.edges), len(known.minimal["resample"])
    (37, 7, 5)

    Attributes:
        model: the hand-wired model, without a tokenizer.
        task: the prompts, scored by `squared_error`: there are no answers, and the KL of a single
            logit is zero. Its gradient vanishes at the clean run, so gradient methods need another
            metric, such as the mean of logits * clean_logits.
        edges: every edge of the computation, true by construction. They are edges of
            `component_graph(model, split_embed=True)`.
        minimal: for the ablations "resample" and "zero", the edges that remain when edges are
            removed from the logits back while the output does not change (as in ACDC with a small
            threshold, the most downstream sources first). Score a method that ablates against
            these, as its ablation cannot show the others.
    """

    model: Model
    task: Task
    edges: Edges
    minimal: Mapping[str, Edges]


def known_circuits() -> tuple[str, ...]:
    """The names that `known_circuit` accepts."""
    return tuple(RECIPES)


@checked_arguments
def known_circuit(
    name: str,
    *,
    rotate: bool = True,
    decoys: bool = True,
    leak: RealNumber = 0.0,
    soft: bool = False,
    seed: WholeNumber = 0,
    n_prompts: WholeNumber = 64,
    device: str | torch.device | None = None,
) -> KnownCircuit:
    """Make a hand-wired model, a task for it, and its true edges.

    >>> import circuits
    >>> circuits.known_circuit("proportion", n_prompts=4).edges
    ('tok_embed->m0', 'm0->a1.h0.v', 'a1.h0->logits')

    The circuits:

    - "induction" (2 layers of 4 heads, 8 true edges of 106): the logits are the mean of the tokens
      that followed earlier occurrences of the current token, as one-hot vectors; zero if there are
      none. a0.h1 copies the previous token. a1.h2 attends from a token to the positions whose
      previous token is the same, and if there are none to BOS, whose value is zero. Resampling
      finds 5 edges: `pos_embed->a0.h1.q` and `.k` are the same in every prompt, and
      `tok_embed->a1.h2.k` only carries whether the token is BOS. Zero ablation finds all 8.
    - "proportion" (2 layers of 2 heads and an MLP, 3 of 61): the single logit is the share of
      token 1 among the positions so far, including BOS. m0 marks the token, a1.h0 averages the
      marks. Its attention is uniform, so no q or k edge exists. Both ablations find all 3.
    - "and" (1 layer of 4 heads and an MLP, 7 of 37): the single logit is 1 if positions 1 and 2
      both hold token 1, else 0. a0.h0 attends to position 1 and a0.h3 to position 2; m0 is
      relu(a + b - 1). Clean prompts hold token 1 at both positions, corrupted ones token 2.
      Resampling finds 5: `pos_embed->a0.h0.k` and `pos_embed->a0.h3.k` are the same in every
      prompt. Zero ablation finds all 7.
    - "or" (as "and", 7 of 37): m0 is relu(a + b) - relu(a + b - 1). Each branch suffices, so
      ablating single edges of the whole model shows only `m0->logits`. A minimal circuit holds
      either branch: that of a0.h0 if the most downstream sources are tried first, as in ACDC.
      Resampling keeps 3 edges, zero ablation 4 (also `pos_embed->a0.h0.k`). Averaging gradients
      on the way to the corrupted prompts can show both branches: `edges` but those of `pos_embed`.

    Args:
        name: one of `known_circuits()`.
        rotate: hide the subspaces by a random basis of the residual stream.
        decoys: give every other head and MLP random weights, which write where nothing reads.
        leak: how strongly decoys also write where other components read, relative to where nothing
            reads. With 0.001 their edges change the logits by a few thousandths, while edges that
            matter change them by 0.4 to 1; the weights then no longer tell them apart.
        soft: use attention scores of 5 instead of 20, so that gradients do not vanish in saturated
            attention. The outputs of "induction" are then off by up to 0.2.
        seed: of the prompts, the decoys and the rotation. The prompts depend on no other option.
        n_prompts: the number of prompt pairs.
        device: None means CUDA if there is any, else the CPU.

    Raises:
        InputError: there is no such circuit, or an option is out of range.
    """
    if name not in RECIPES:
        raise InputError(f"there is no known circuit {name!r}; {suggestion(name, RECIPES)}")
    leak, n_prompts = float(leak), whole(n_prompts, "n_prompts", least=1)
    if not 0 <= leak < 1:
        raise InputError(f"leak={leak} is out of range: give at least 0 and less than 1.")
    if leak and not decoys:
        raise InputError(f"leak={leak} needs decoys, which leak; use decoys=True or leak=0.")
    recipe = RECIPES[name]
    wiring = recipe.wire(SOFT if soft else SHARP)
    # The prompts have a generator of their own, so that they do not depend on these options.
    generator = random_generator(seed)
    weights = wiring.with_decoys(generator, leak) if decoys else wiring.weights
    if rotate:
        weights = rotated(weights, generator)
    # Run folders and error messages show the name.
    config = {**wiring.config, "model_name": f"known-{name}"}
    model = build_model(config, weights, device=device)
    edges = tuple(map(str, wiring.edges))
    seed = whole(seed, "seed")
    task = recipe.task(config, n_prompts, seed)
    return KnownCircuit(model, task, edges, recipe.minimal(edges))
