"""The tokens that an incremental run computes.

Activations hold the tokens of all prompts on one axis, the scored tokens last and in the order of
the task's scored rows. So the scored tokens of an activation are the end of this axis.
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
ByPrompt = Float[Tensor, "*rows batch place width"]
Keys = Float[Tensor, "head batch key d_head"]
VariantKeys = Float[Tensor, "head variant batch key d_head"]


@dataclass(frozen=True, eq=False)
class TokenSet:
    """A set of tokens, in the order in which activations hold them.

    Attributes:
        prompts, positions: prompt and position of each token.
        keys: its place among the flattened keys of all prompts.
        by_prompt: the tokens of each prompt, in order; shorter prompts are padded with token 0.
        places: where each token is in the flattened `by_prompt`.
        one_per_prompt: whether the set is one token of each prompt, in the order of the prompts.
    """

    prompts: TokenIndex
    positions: TokenIndex
    keys: TokenIndex
    by_prompt: Int[Tensor, "batch place"]
    places: TokenIndex
    one_per_prompt: bool

    @staticmethod
    def of(tokens: Int[Tensor, "token 2"], readable: Readable) -> TokenSet:
        """Index tokens given by prompt and position."""
        prompts, positions = tokens.T.contiguous()
        n_prompts, n_keys = readable.shape
        present = torch.zeros_like(readable, dtype=torch.long)
        present[prompts, positions] = 1
        # Each token's place in its prompt: the number of tokens before it.
        rank = (present.cumsum(1) - 1)[prompts, positions]
        width = int(rank.max()) + 1
        by_prompt = rank.new_zeros(n_prompts, width)
        by_prompt[prompts, rank] = torch.arange(len(tokens), device=tokens.device)
        places, keys = prompts * width + rank, prompts * n_keys + positions
        one_per_prompt = prompts.tolist() == list(range(n_prompts))
        return TokenSet(prompts, positions, keys, by_prompt, places, one_per_prompt)

    def __len__(self) -> int:
        """The number of tokens."""
        return self.positions.shape[0]

    def gather(self, activation: Float[Tensor, "*rows batch pos width"]) -> ByToken:
        """These tokens of an activation that has all positions of all prompts."""
        return activation[..., self.prompts, self.positions, :]

    def select(self, rows: Float[Tensor, "*rows longer width"]) -> ByToken:
        """These tokens of an activation that ends with them; a view."""
        return rows[..., -self.positions.shape[0] :, :]

    def to_prompts(self, rows: ByToken) -> ByPrompt:
        """Arrange tokens by prompt, as attention needs them."""
        if self.one_per_prompt:
            return rows[..., :, None, :]
        flat = rows.index_select(-2, self.by_prompt.flatten())
        return flat.unflatten(-2, self.by_prompt.shape)

    def to_tokens(self, rows: ByPrompt) -> ByToken:
        """Undo `to_prompts`."""
        flat = rows.flatten(-3, -2)
        return flat if self.one_per_prompt else flat.index_select(-2, self.places)

    def into_keys(
        self, base: Keys, found: Float[Tensor, "head variant token d_head"]
    ) -> VariantKeys:
        """Keys or values at all positions: `found` at these tokens, `base` elsewhere."""
        keys = base.flatten(1, 2)[:, None].repeat(1, found.shape[1], 1, 1)
        keys.index_copy_(2, self.keys, found)
        return keys.unflatten(2, base.shape[1:3])


@dataclass(frozen=True, eq=False)
class Window:
    """The token sets of a task.

    Attributes:
        everywhere: the tokens that can affect a scored token.
        all: those of them that can change: the only ones that variants compute.
        scored: the scored tokens: enough for a node that no key or value depends on.
        readable: which positions of each prompt can be attended to.
    """

    everywhere: TokenSet
    all: TokenSet
    scored: TokenSet
    readable: Readable

    @staticmethod
    def of(task: Task, *, causal: bool, resample: bool) -> Window:
        """Find the token sets; `resample`: counterfactuals are activations on corrupted prompts."""
        length = task.clean.shape[1]
        index = torch.arange(length, device=task.clean.device)
        # Under causal attention nothing after the last scored token of a prompt matters.
        matters = task.scored if causal else task.mask
        last = torch.where(matters, index, 0).amax(1, keepdim=True)
        everywhere = can_change = task.mask & (index <= last)
        # Nothing changes before the first token at which the prompts differ.
        if causal and resample:
            starts = (task.clean != task.corrupted) | task.scored
            first = torch.where(starts, index, length - 1).amin(1, keepdim=True)
            can_change = everywhere & (index >= first)
        readable = everywhere[:, : int(last.max()) + 1]
        scored = task.scored.nonzero()
        sets = []
        for tokens in (everywhere, can_change, task.scored):
            unscored = (tokens & ~task.scored).nonzero()
            sets.append(TokenSet.of(torch.cat([unscored, scored]), readable))
        return Window(sets[0], sets[1], sets[2], readable)
