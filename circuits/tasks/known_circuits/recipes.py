"""How each known circuit is wired, its prompts, and the true edges that ablation cannot show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.nodes import MLP, Head
from circuits.tasks.known_circuits.wiring import POSITION, TOKEN, Wiring
from circuits.tasks.task import Task

BOS = 0
COUNTED = YES = 1
NO = 2
ONE = torch.ones(1, 1)


def _wire_induction(wiring: Wiring) -> None:
    _wire_previous_token_head(wiring)
    n_tokens = wiring.config["d_vocab"]
    tokens = torch.eye(n_tokens)
    words = tokens.clone()
    words[BOS] = 0
    # a1.h2 attends to positions whose previous token is the current one. One more dimension lets
    # it attend to BOS, whose value is zero, if there is no such position: there q is always 1,
    # and k is half a match at BOS.
    half_at_bos = torch.zeros(n_tokens, n_tokens + 1)
    half_at_bos[BOS, -1] = 0.5
    always = torch.eye(n_tokens + 1)[-1]
    keys = {"previous": words, TOKEN: half_at_bos}
    values = {TOKEN: words}
    wiring.head(Head(1, 2), q={TOKEN: tokens}, b_q=always, k=keys, v=values, writes="copied")
    wiring.unembed({"copied": tokens})


def _wire_previous_token_head(wiring: Wiring) -> None:
    n_positions = wiring.config["n_ctx"]
    # k at position j equals q at position j + 1, which thus attends to j.
    one_later = torch.diag(torch.ones(n_positions - 1), 1)
    queries = {POSITION: torch.eye(n_positions)}
    values = {TOKEN: torch.eye(wiring.config["d_vocab"])}
    wiring.head(Head(0, 1), q=queries, k={POSITION: one_later}, v=values, writes="previous")


def _wire_proportion(wiring: Wiring) -> None:
    # m0 marks the counted word, and a1.h0 averages the marks of the positions so far.
    is_counted = {TOKEN: _one_at(COUNTED, wiring.config["d_vocab"])}
    wiring.mlp(MLP(0), reads=is_counted, bias=torch.zeros(1), output=ONE, writes="counted")
    wiring.head(Head(1, 0), q={}, k={}, v={"counted": ONE}, writes="share")
    wiring.unembed({"share": ONE})


def _wire_gate(wiring: Wiring, bias: Tensor, output: Tensor) -> None:
    # The value of a bit is 1 at the token YES and 0 at others.
    is_yes = {TOKEN: _one_at(YES, wiring.config["d_vocab"])}
    for bit, position, head in (("first", 1, 0), ("second", 2, 3)):
        # From every position, the head attends to the position of its bit.
        there = {POSITION: _one_at(position, wiring.config["n_ctx"])}
        wiring.head(Head(0, head), q={}, b_q=ONE[0], k=there, v=is_yes, writes=bit)
    # Every neuron reads the sum of the two bits.
    both = dict.fromkeys(("first", "second"), torch.ones(1, len(bias)))
    wiring.mlp(MLP(0), reads=both, bias=bias, output=output, writes="gate")
    wiring.unembed({"gate": ONE})


def _one_at(index: int, size: int) -> Float[Tensor, "size 1"]:
    return torch.eye(size)[:, [index]]


@dataclass(frozen=True)
class Recipe:
    """How one known circuit is made. Its prompts are BOS and random words, the tokens from 1 up."""

    # Sets the weights.
    wire: Callable[[Wiring], None]
    # The sizes of the model, under TransformerLens's names. Prompts have n_ctx tokens.
    sizes: Mapping[str, int]
    # Name and width of each subspace that a component writes.
    subspaces: Mapping[str, int]
    # For each ablation, the true edges that the minimal circuit lacks.
    not_found: Mapping[str, tuple[str, ...]]
    # The first scored position; all later ones are scored too.
    scored_from: int = 1
    # The words at positions that are not random.
    clean_words: Mapping[int, int] = field(default_factory=dict)
    corrupted_words: Mapping[int, int] = field(default_factory=dict)

    def task(self, name: str, n_prompts: int, seed: int) -> Task:
        """Random prompts; the corrupted ones are drawn independently of the clean ones."""
        generator = torch.Generator().manual_seed(seed)
        shape = (n_prompts, self.sizes["n_ctx"])
        prompts = []
        # Other words than the fixed ones are random.
        for fixed_words in (self.clean_words, self.corrupted_words):
            tokens = torch.randint(1, self.sizes["d_vocab"], shape, generator=generator)
            tokens[:, 0] = BOS
            for position, word in fixed_words.items():
                tokens[:, position] = word
            prompts.append(tokens)
        scored = torch.zeros(shape, dtype=torch.bool)
        scored[:, self.scored_from :] = True
        return Task.from_tokens(
            *prompts, answer_positions=scored, metric="squared_error", name=name
        )

    def minimal(self, edges: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """For each ablation, the true edges that it shows."""
        found = {}
        for ablation, missing in self.not_found.items():
            found[ablation] = tuple(edge for edge in edges if edge not in missing)
        return found


# Prompts have more positions than there are words, so that some word is repeated in each. The
# previous-token head needs a dimension for every position.
INDUCTION = Recipe(
    _wire_induction,
    dict(n_layers=2, n_heads=4, d_head=11, n_ctx=11, d_vocab=9, d_vocab_out=9),
    {"previous": 9, "copied": 9},
    not_found={
        # These carry the same in every prompt, so resampling changes nothing.
        "resample": ("pos_embed->a0.h1.q", "pos_embed->a0.h1.k", "tok_embed->a1.h2.k"),
        "zero": (),
    },
)
PROPORTION = Recipe(
    _wire_proportion,
    dict(n_layers=2, n_heads=2, d_head=4, n_ctx=7, d_vocab=5, d_vocab_out=1, d_mlp=6),
    {"counted": 1, "share": 1},
    not_found={"resample": (), "zero": ()},
)
GATE_CONSTANTS = ("pos_embed->a0.h0.k", "pos_embed->a0.h3.k")
AND = Recipe(
    # and(a, b) = relu(a + b - 1)
    partial(_wire_gate, bias=torch.tensor([-1.0]), output=ONE),
    dict(n_layers=1, n_heads=4, d_head=4, n_ctx=6, d_vocab=6, d_vocab_out=1, d_mlp=4),
    {"first": 1, "second": 1, "gate": 1},
    not_found={"resample": GATE_CONSTANTS, "zero": ()},
    scored_from=5,
    clean_words={1: YES, 2: YES},
    corrupted_words={1: NO, 2: NO},
)
# Redundant while the other branch is intact.
SECOND_BRANCH = ("pos_embed->a0.h3.k", "tok_embed->a0.h3.v", "a0.h3->m0")
OR_NOT_FOUND = {"resample": GATE_CONSTANTS + SECOND_BRANCH, "zero": SECOND_BRANCH}
# or(a, b) = relu(a + b) - relu(a + b - 1)
OR_BIAS, OR_OUTPUT = torch.tensor([0.0, -1.0]), torch.tensor([[1.0], [-1.0]])
_wire_or = partial(_wire_gate, bias=OR_BIAS, output=OR_OUTPUT)
OR = replace(AND, wire=_wire_or, not_found=OR_NOT_FOUND)

RECIPES = {"induction": INDUCTION, "proportion": PROPORTION, "and": AND, "or": OR}
