"""The tokens that an incremental run computes.

Activations hold the tokens of all prompts on one axis. It ends with the scored tokens, in the order
of the task's scored rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.tasks.task import Task

TokenIndex = Int[Tensor, " token"]
Readable = Bool[Tensor, "batch key"]
ByToken = Float[Tensor, "*rows token width"]
Longer = Float[Tensor, "*rows longer width"]
ByPosition = Float[Tensor, "*rows batch pos width"]
ByPrompt = Float[Tensor, "*rows batch place width"]
Keys = Float[Tensor, "head batch key d_head"]
NewKeys = Float[Tensor, "head variant token d_head"]
VariantKeys = Float[Tensor, "head variant batch key d_head"]


@dataclass(frozen=True, eq=False)
class TokenSet:
    """A set of tokens, in the order in which activations hold them."""

    prompts: TokenIndex
    positions: TokenIndex
    # The place of each token among the flattened keys of all prompts.
    keys: TokenIndex
    # The tokens of each prompt, in order; shorter prompts are padded with token 0.
    by_prompt: Int[Tensor, "batch place"]
    # The place of each token in the flattened `by_prompt`.
    places: TokenIndex

    @staticmethod
    def of(tokens: Int[Tensor, "token 2"], readable: Readable) -> TokenSet:
        """Index tokens given by prompt and position."""
        prompts, positions = tokens.T.contiguous()
        n_prompts, n_keys = readable.shape
        present = torch.zeros_like(readable, dtype=torch.long)
        present[prompts, positions] = 1
        # Each token's place in its prompt is the number of tokens before it.
        n_before = present.cumsum(1) - present
        rank = n_before[prompts, positions]
        width = int(rank.max()) + 1
        by_prompt = rank.new_zeros(n_prompts, width)
        by_prompt[prompts, rank] = torch.arange(len(tokens), device=tokens.device)
        keys, places = prompts * n_keys + positions, prompts * width + rank
        return TokenSet(prompts, positions, keys, by_prompt, places)

    def __len__(self) -> int:
        """The number of tokens."""
        return self.positions.shape[0]

    def gather(self, activation: ByPosition) -> ByToken:
        """These tokens of an activation that has all positions of all prompts."""
        return activation[..., self.prompts, self.positions, :]

    def select(self, rows: Longer) -> ByToken:
        """These tokens of an activation that ends with them; a view."""
        return rows[..., -len(self) :, :]

    def to_prompts(self, rows: ByToken) -> ByPrompt:
        """Arrange tokens by prompt, as attention needs them."""
        order = self.by_prompt.flatten()
        flat = rows.index_select(-2, order)
        return flat.unflatten(-2, self.by_prompt.shape)

    def to_tokens(self, rows: ByPrompt) -> ByToken:
        """Undo `to_prompts`."""
        flat = rows.flatten(-3, -2)
        return flat.index_select(-2, self.places)

    def into_keys(self, base: Keys, found: NewKeys) -> VariantKeys:
        """Keys or values at all positions: `found` at these tokens, `base` elsewhere."""
        n_variants = found.shape[1]
        # `repeat` takes twice as long to copy the base for each variant.
        flat = base.flatten(1, 2)[:, None]
        keys = flat.expand(-1, n_variants, -1, -1).clone()
        keys.index_copy_(2, self.keys, found)
        return keys.unflatten(2, base.shape[1:3])


@dataclass(frozen=True, eq=False)
class Window:
    """The token sets of a task."""

    # Which positions of each prompt can be attended to.
    readable: Readable
    # The tokens that can affect a scored token.
    everywhere: TokenSet
    # Those of them that can change: the only ones that variants compute.
    all: TokenSet
    # Enough for a node that no key or value depends on.
    scored: TokenSet

    @staticmethod
    def of(task: Task, *, causal: bool, resample: bool) -> Window:
        """Find the token sets; `resample`: counterfactuals are activations on corrupted prompts."""
        length = task.clean.shape[1]
        index = torch.arange(length, device=task.clean.device)
        # Under causal attention nothing after the last scored token of a prompt matters.
        matters = task.scored if causal else task.mask
        last = (matters * index).amax(1, keepdim=True)
        everywhere = changing = task.mask & (index <= last)
        # Nothing changes before the first token at which the prompts differ.
        if causal and resample:
            differs = (task.clean != task.corrupted) | task.scored
            changing = everywhere & (differs.cumsum(1) > 0)
        n_keys = int(last.max()) + 1
        readable = everywhere[:, :n_keys]
        sets, scored = [], task.scored.nonzero()
        for tokens in (everywhere, changing, task.scored):
            unscored = (tokens & ~task.scored).nonzero()
            in_order = torch.cat([unscored, scored])
            sets.append(TokenSet.of(in_order, readable))
        return Window(readable, *sets)
