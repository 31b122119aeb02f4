"""How each known circuit is wired, its prompts, and the true edges that ablation cannot show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from circuits.graph.nodes import MLP, Head
from circuits.tasks.known_circuits.wiring import POSITION, TOKEN, Matrix, Wiring
from circuits.tasks.task import Task

Edges = tuple[str, ...]

BOS = 0
COUNTED = YES = 1
NO = 2
ONE = torch.ones(1, 1)

# Under TransformerLens's names. Induction has more positions than words, so that some word is
# repeated in each prompt, and its previous-token head has a dimension for every position.
INDUCTION_SIZES = dict(n_layers=2, n_heads=4, d_head=11, n_ctx=11, d_vocab=9, d_vocab_out=9)
PROPORTION_SIZES = dict(n_layers=2, n_heads=2, d_head=4, d_mlp=6, n_ctx=7, d_vocab=5, d_vocab_out=1)
GATE_SIZES = dict(n_layers=1, n_heads=4, d_head=4, d_mlp=4, n_ctx=6, d_vocab=6, d_vocab_out=1)


def _wire_induction(sharpness: float) -> Wiring:
    n_tokens, n_positions = INDUCTION_SIZES["d_vocab"], INDUCTION_SIZES["n_ctx"]
    widths = {"previous": n_tokens, "copied": n_tokens}
    wiring = Wiring(INDUCTION_SIZES, widths, sharpness)
    tokens = torch.eye(n_tokens)
    here = {POSITION: torch.eye(n_positions)}
    # k at position j equals q at position j + 1, which thus attends to j.
    one_later = torch.diag(torch.ones(n_positions - 1), 1)
    before = {POSITION: one_later}
    wiring.head(Head(0, 1), "previous", q=here, k=before, v={TOKEN: tokens})
    _wire_induction_head(wiring, tokens)
    wiring.unembed({"copied": tokens})
    return wiring


def _wire_induction_head(wiring: Wiring, tokens: Tensor) -> None:
    n_tokens = len(tokens)
    words = tokens.clone()
    words[BOS] = 0
    # The head attends to positions whose previous token is the current one. One more dimension lets
    # it attend to BOS, whose value is zero, if there is no such position: there q is always 1,
    # and k is half a match at BOS.
    half_at_bos = torch.zeros(n_tokens, n_tokens + 1)
    half_at_bos[BOS, -1] = 0.5
    always = torch.eye(n_tokens + 1)[-1]
    wiring.head(
        Head(1, 2),
        "copied",
        q={TOKEN: tokens},
        b_q=always,
        k={"previous": words, TOKEN: half_at_bos},
        v={TOKEN: words},
    )


def _wire_proportion(sharpness: float) -> Wiring:
    widths = {"counted": 1, "share": 1}
    wiring = Wiring(PROPORTION_SIZES, widths, sharpness)
    # m0 marks the counted word, and a1.h0 averages the marks of the positions so far.
    is_counted = {TOKEN: _one_at(COUNTED, PROPORTION_SIZES["d_vocab"])}
    no_bias = torch.zeros(1)
    wiring.mlp(MLP(0), "counted", reads=is_counted, bias=no_bias, output=ONE)
    wiring.head(Head(1, 0), "share", q={}, k={}, v={"counted": ONE})
    wiring.unembed({"share": ONE})
    return wiring


def _wire_gate(bias: Tensor, output: Tensor, sharpness: float) -> Wiring:
    widths = {"first": 1, "second": 1, "gate": 1}
    wiring = Wiring(GATE_SIZES, widths, sharpness)
    # From every position, a0.h0 attends to position 1, and a0.h3 to position 2.
    _wire_bit(wiring, Head(0, 0), "first", 1)
    _wire_bit(wiring, Head(0, 3), "second", 2)
    # Every neuron reads the sum of the two bits.
    to_every_neuron = torch.ones(1, len(bias))
    both = {"first": to_every_neuron, "second": to_every_neuron}
    wiring.mlp(MLP(0), "gate", reads=both, bias=bias, output=output)
    wiring.unembed({"gate": ONE})
    return wiring


def _wire_bit(wiring: Wiring, head: Head, bit: str, position: int) -> None:
    there = {POSITION: _one_at(position, GATE_SIZES["n_ctx"])}
    # The value of a bit is 1 at the token YES and 0 at others.
    is_yes = {TOKEN: _one_at(YES, GATE_SIZES["d_vocab"])}
    wiring.head(head, bit, q={}, b_q=ONE[0], k=there, v=is_yes)


def _one_at(index: int, size: int) -> Matrix:
    return torch.eye(size)[:, [index]]


@dataclass(frozen=True)
class Recipe:
    """How one known circuit is made. Its prompts are BOS and random words, the tokens from 1 up."""

    # Makes the model for a given sharpness of attention. Prompts have n_ctx tokens.
    wire: Callable[[float], Wiring]
    # For each ablation, the true edges that the minimal circuit lacks.
    not_found: Mapping[str, Edges]
    # The first scored position; all later ones are scored too.
    scored_from: int = 1
    # The words at positions that are not random.
    clean_words: Mapping[int, int] = field(default_factory=dict)
    corrupted_words: Mapping[int, int] = field(default_factory=dict)

    def task(self, config: Mapping[str, Any], n_prompts: int, seed: int) -> Task:
        """Random prompts; the corrupted ones are drawn independently of the clean ones."""
        generator = torch.Generator().manual_seed(seed)
        shape = (n_prompts, config["n_ctx"])
        prompts = []
        for fixed_words in (self.clean_words, self.corrupted_words):
            tokens = torch.randint(1, config["d_vocab"], shape, generator=generator)
            tokens[:, 0] = BOS
            for position, word in fixed_words.items():
                tokens[:, position] = word
            prompts.append(tokens)
        # BOS is never scored, as nothing comes before it.
        scored = torch.zeros(shape, dtype=torch.bool)
        scored[:, self.scored_from :] = True
        name = config["model_name"]
        return Task.from_tokens(
            *prompts, answer_positions=scored, metric="squared_error", name=name
        )

    def minimal(self, edges: Edges) -> dict[str, Edges]:
        """For each ablation, the true edges that it shows."""
        return {
            ablation: tuple(edge for edge in edges if edge not in missing)
            for ablation, missing in self.not_found.items()
        }


# These edges carry the same in every prompt, so resampling changes nothing.
SAME_IN_INDUCTION = ("pos_embed->a0.h1.q", "pos_embed->a0.h1.k", "tok_embed->a1.h2.k")
SAME_IN_GATES = ("pos_embed->a0.h0.k", "pos_embed->a0.h3.k")
# Redundant while the other branch is intact.
SECOND_BRANCH = ("pos_embed->a0.h3.k", "tok_embed->a0.h3.v", "a0.h3->m0")

# and(a, b) = relu(a + b - 1)
AND = Recipe(
    partial(_wire_gate, -torch.ones(1), ONE),
    {"resample": SAME_IN_GATES, "zero": ()},
    scored_from=5,
    clean_words={1: YES, 2: YES},
    corrupted_words={1: NO, 2: NO},
)
# or(a, b) = relu(a + b) - relu(a + b - 1)
OR_BIAS = torch.tensor([0.0, -1.0])
OR_OUTPUT = torch.tensor([[1.0], [-1.0]])
OR = replace(
    AND,
    wire=partial(_wire_gate, OR_BIAS, OR_OUTPUT),
    not_found={"resample": SAME_IN_GATES + SECOND_BRANCH, "zero": SECOND_BRANCH},
)
RECIPES = {
    "induction": Recipe(_wire_induction, {"resample": SAME_IN_INDUCTION, "zero": ()}),
    "proportion": Recipe(_wire_proportion, {"resample": (), "zero": ()}),
    "and": AND,
    "or": OR,
}
