"""Known circuits: hand-wired transformers whose edges are true by construction, each with a task that runs through them.

Truth comes from the wiring (see `circuits.tasks.known_circuits.wiring`), so finding it is evidence, which agreement with a patching method is not.
Four models, each with decoys, in a rotated basis: an induction circuit (composition through k), a proportion (a head that attends
alike to all positions, so no q or k edge exists), and the gates `and` and `or` of two tokens (`or` is redundant).

Not every true edge can be found. Resampling changes nothing where a node's output is the same in every prompt, and ablating one
edge shows nothing where another edge does the same work; `KnownCircuit.minimal` says what is left for each ablation, and
`known_circuit` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.models import Model, build_model
from circuits.system.errors import InputError
from circuits.tasks.known_circuits.wiring import POSITION, TOKEN, Attends, Shape, Wiring, rotated
from circuits.tasks.task import Task

SHARP, SOFT = 20.0, 5.0
"""How far the logit of an attended position stands above the others'."""

BOS = 0
INDUCTION_WORDS, INDUCTION_LENGTH = 8, 10
PROPORTION_WORDS, PROPORTION_LENGTH, COUNTED = 4, 6, 1
GATE_WORDS, GATE_LENGTH, YES, NO = 5, 5, 1, 2

Tokens = Int[Tensor, "batch pos"]


@dataclass(frozen=True, eq=False)
class KnownCircuit:
    """A model, a task, and the truth about how the model does it.

    Attributes:
        model: the hand-wired model, without a tokenizer.
        task: clean prompts, corrupted prompts drawn independently of them, metric `squared_error`. It has no answers, and KL is always zero
            where there is one logit. Gradients at the clean run need a metric that is not flat there, such as the mean of
            logits * clean_logits.
        edges: every edge of the computation, true by construction. They are edges of `component_graph(model, split_embed=True)`.
        minimal: for the ablations "resample" and "zero", the edges that remain when edges are removed from the logits up for as long as
            the output stands (as ACDC does with a small threshold, sources from the most downstream). Score a method that ablates
            against these; recall against `edges` faults a method for edges that its ablation cannot show.
    """

    model: Model
    task: Task
    edges: tuple[str, ...]
    minimal: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Recipe:
    """How one known circuit is made.

    Attributes:
        wire: makes the wiring, from the sharpness of attention.
        draw: makes clean and corrupted prompts, from their number and a generator.
        scored_from: the first position whose logits are scored; all later ones are too.
        not_found: true edges that are missing from the minimal circuit, by ablation.
    """

    wire: Callable[[float], Wiring]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    scored_from: int
    not_found: Mapping[str, tuple[str, ...]]


def known_circuits() -> tuple[str, ...]:
    """The names that `known_circuit` takes."""
    return tuple(RECIPES)


def known_circuit(
    name: str,
    *,
    rotate: bool = True,
    decoys: bool = True,
    leak: float = 0.0,
    soft: bool = False,
    seed: int = 0,
    n_prompts: int = 64,
    device: str | torch.device | None = None,
) -> KnownCircuit:
    """A hand-wired model, a task for it, and its true edges.

    - "induction" (2 layers of 4 heads, 8 true edges of 106): the logits are the mean of the tokens that followed earlier occurrences
      of the current token, as one-hot vectors; zero when there are none. a0.h1 copies the previous token, a1.h2 attends from a token
      to the positions whose previous token is the same, and to BOS, whose value is zero, when there are none.
      Resampling finds 5: positions are the same in every prompt, so `pos_embed->a0.h1.q` and `.k` carry nothing to resample,
      and `tok_embed->a1.h2.k` reads only whether the token is BOS. Zero ablation finds all 8.
    - "proportion" (2 layers of 2 heads and an MLP, 3 of 61): the one logit is the share of token 1 among the positions so far, BOS
      included. m0 marks the token, a1.h0 averages the marks. Resampling and zero ablation find all 3.
    - "and" (1 layer of 4 heads and an MLP, 7 of 37): the one logit is 1 where positions 1 and 2 both hold token 1, else 0. a0.h0 looks
      at position 1 and a0.h3 at position 2; m0 is relu(a + b - 1). Clean prompts hold 1 at both, corrupted ones 2 at both.
      Resampling finds 5, all but `pos_embed->a0.h0.k` and `pos_embed->a0.h3.k`, which are the same in every prompt. Zero finds all 7.
    - "or" (as "and", 7 of 37): m0 is relu(a + b) - relu(a + b - 1). Each branch suffices, so ablating edges one at a time from the whole
      model shows only `m0->logits`, and a minimal circuit holds one branch, arbitrarily: that of a0.h0 when, as in ACDC, the
      most downstream sources are tried first. Resampling keeps 3, zero ablation 4 (also `pos_embed->a0.h0.k`). A method that averages
      gradients on the way to the corrupted prompts can see both branches: `edges` without the two from `pos_embed`.

    Args:
        name: one of `known_circuits()`.
        rotate: turn the basis of the residual stream at random, so that the slots cannot be read off the weights.
        decoys: fill every other head and MLP with random weights that read everything and write where nothing reads.
        leak: how strongly decoys also write where others read, relative to where nothing reads. With 0.001 their edges change logits by
            a few thousandths, where edges that matter on their own change them by 0.4 to 1; weights no longer tell them apart.
        soft: attention logits of 5 in place of 20, so that gradients do not vanish in saturated attention; the outputs are
            then off by up to 0.2 in "induction". In "proportion" attention is even anyway.
        seed: of the prompts, the decoys and the rotation. Prompts do not depend on the other options.
        n_prompts: number of prompt pairs.
        device: None takes CUDA when there is one, else the CPU.

    Raises:
        InputError: there is no such circuit, or an option is out of range.
    """
    if name not in RECIPES:
        raise InputError(f"there is no known circuit {name!r}; there are {', '.join(RECIPES)}.")
    _check_options(decoys, leak, n_prompts)
    recipe = RECIPES[name]
    wiring = recipe.wire(SOFT if soft else SHARP)
    generator = torch.Generator().manual_seed(seed)
    weights = wiring.with_decoys(generator, leak) if decoys else wiring.weights
    weights = rotated(weights, generator) if rotate else weights
    model = build_model({**wiring.config, "model_name": f"known-{name}"}, weights, device=device)
    edges = tuple(str(edge) for edge in wiring.edges)
    minimal = {
        ablation: tuple(edge for edge in edges if edge not in missing)
        for ablation, missing in recipe.not_found.items()
    }
    return KnownCircuit(model, _task(name, recipe, n_prompts, seed), edges, minimal)


def _check_options(decoys: bool, leak: float, n_prompts: int) -> None:
    if not 0 <= leak < 1:
        raise InputError(
            f"leak={leak} is out of range: give a number of at least 0 and below 1, for example 0.001."
        )
    if leak and not decoys:
        raise InputError(
            f"leak={leak} needs decoys, which are what leaks; use decoys=True or leak=0."
        )
    if n_prompts < 1:
        raise InputError(f"n_prompts={n_prompts}: a task needs at least one prompt.")


def _task(name: str, recipe: Recipe, n_prompts: int, seed: int) -> Task:
    clean, corrupted = recipe.draw(n_prompts, torch.Generator().manual_seed(seed))
    scored = torch.zeros(clean.shape, dtype=torch.bool)
    scored[:, recipe.scored_from :] = True
    return Task.from_tokens(
        clean, corrupted, answer_positions=scored, metric="squared_error", name=f"known-{name}"
    )


# The four wirings


def _wire_induction(sharpness: float) -> Wiring:
    vocabulary, length = INDUCTION_WORDS + 1, INDUCTION_LENGTH + 1
    shape = Shape(
        n_layers=2,
        n_heads=4,
        d_head=length,
        n_ctx=length,
        d_vocab=vocabulary,
        d_vocab_out=vocabulary,
    )
    wiring = Wiring(shape, {"previous": vocabulary, "copied": vocabulary})
    one_back = torch.diag(torch.ones(length - 1), -1)
    back = Attends(POSITION, POSITION, one_back)
    wiring.head(
        0,
        1,
        attends=[back],
        copies=TOKEN,
        matrix=torch.eye(vocabulary),
        writes="previous",
        sharpness=sharpness,
    )

    words = torch.eye(vocabulary)
    words[BOS, BOS] = 0
    same = Attends(TOKEN, "previous", words)
    # Half as strong as a match, so that BOS is attended to only where there is none.
    otherwise = Attends(None, TOKEN, _one_hot(BOS, vocabulary) / 2)
    wiring.head(
        1,
        2,
        attends=[same, otherwise],
        copies=TOKEN,
        matrix=words,
        writes="copied",
        sharpness=sharpness,
    )
    wiring.unembed("copied", torch.eye(vocabulary))
    return wiring


def _wire_proportion(sharpness: float) -> Wiring:
    vocabulary, length = PROPORTION_WORDS + 1, PROPORTION_LENGTH + 1
    shape = Shape(
        n_layers=2, n_heads=2, d_head=4, n_ctx=length, d_vocab=vocabulary, d_vocab_out=1, d_mlp=6
    )
    wiring = Wiring(shape, {"counted": 1, "share": 1})
    wiring.mlp(
        0,
        reads={TOKEN: _one_hot(COUNTED, vocabulary).T},
        bias=torch.zeros(1),
        matrix=torch.ones(1, 1),
        writes="counted",
    )
    wiring.head(
        1,
        0,
        attends=[],
        copies="counted",
        matrix=torch.ones(1, 1),
        writes="share",
        sharpness=sharpness,
    )
    wiring.unembed("share", torch.ones(1, 1))
    return wiring


def _wire_and(sharpness: float) -> Wiring:
    # relu(a + b - 1)
    return _wire_gate(sharpness, bias=torch.tensor([-1.0]), matrix=torch.ones(1, 1))


def _wire_or(sharpness: float) -> Wiring:
    # relu(a + b) - relu(a + b - 1)
    return _wire_gate(
        sharpness, bias=torch.tensor([0.0, -1.0]), matrix=torch.tensor([[1.0], [-1.0]])
    )


def _wire_gate(
    sharpness: float, bias: Float[Tensor, " neuron"], matrix: Float[Tensor, "neuron 1"]
) -> Wiring:
    vocabulary, length = GATE_WORDS + 1, GATE_LENGTH + 1
    shape = Shape(
        n_layers=1, n_heads=4, d_head=4, n_ctx=length, d_vocab=vocabulary, d_vocab_out=1, d_mlp=4
    )
    wiring = Wiring(shape, {"first": 1, "second": 1, "gate": 1})
    for head, position, bit in ((0, 1, "first"), (3, 2, "second")):
        there = Attends(None, POSITION, _one_hot(position, length))
        wiring.head(
            0,
            head,
            attends=[there],
            copies=TOKEN,
            matrix=_one_hot(YES, vocabulary).T,
            writes=bit,
            sharpness=sharpness,
        )
    both = {bit: torch.ones(1, len(bias)) for bit in ("first", "second")}
    wiring.mlp(0, reads=both, bias=bias, matrix=matrix, writes="gate")
    wiring.unembed("gate", torch.ones(1, 1))
    return wiring


def _one_hot(index: int, size: int) -> Float[Tensor, "1 size"]:
    return torch.eye(size)[index : index + 1]


# Prompts


def _draw_induction(n_prompts: int, generator: torch.Generator) -> tuple[Tokens, Tokens]:
    """More positions than words, so that in every prompt some word comes again."""
    clean, corrupted = (
        _words(n_prompts, INDUCTION_LENGTH, INDUCTION_WORDS, generator) for _ in range(2)
    )
    return clean, corrupted


def _draw_proportion(n_prompts: int, generator: torch.Generator) -> tuple[Tokens, Tokens]:
    clean, corrupted = (
        _words(n_prompts, PROPORTION_LENGTH, PROPORTION_WORDS, generator) for _ in range(2)
    )
    return clean, corrupted


def _draw_gate(n_prompts: int, generator: torch.Generator) -> tuple[Tokens, Tokens]:
    """Both bits set in the clean prompts, neither in the corrupted ones; the other positions hold any words."""
    clean, corrupted = (_words(n_prompts, GATE_LENGTH, GATE_WORDS, generator) for _ in range(2))
    clean[:, 1:3], corrupted[:, 1:3] = YES, NO
    return clean, corrupted


def _words(n_prompts: int, length: int, words: int, generator: torch.Generator) -> Tokens:
    """BOS and then words at random."""
    tokens = torch.randint(1, words + 1, (n_prompts, length + 1), generator=generator)
    tokens[:, 0] = BOS
    return tokens


ALIKE_IN_EVERY_PROMPT = ("pos_embed->a0.h0.k", "pos_embed->a0.h3.k")
SECOND_BRANCH = ("pos_embed->a0.h3.k", "tok_embed->a0.h3.v", "a0.h3->m0")

RECIPES = {
    "induction": Recipe(
        _wire_induction,
        _draw_induction,
        scored_from=1,
        not_found={
            "resample": ("pos_embed->a0.h1.q", "pos_embed->a0.h1.k", "tok_embed->a1.h2.k"),
            "zero": (),
        },
    ),
    "proportion": Recipe(
        _wire_proportion, _draw_proportion, scored_from=1, not_found={"resample": (), "zero": ()}
    ),
    "and": Recipe(
        _wire_and,
        _draw_gate,
        scored_from=GATE_LENGTH,
        not_found={"resample": ALIKE_IN_EVERY_PROMPT, "zero": ()},
    ),
    "or": Recipe(
        _wire_or,
        _draw_gate,
        scored_from=GATE_LENGTH,
        not_found={"resample": (*ALIKE_IN_EVERY_PROMPT, *SECOND_BRANCH), "zero": SECOND_BRANCH},
    ),
}
