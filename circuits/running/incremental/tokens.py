"""Which tokens of a task an incremental run computes: those that can change, up to the last one of each prompt that matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models.functional import HeadSelection
from circuits.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Layout:
    """Where tokens stand when they are sorted by prompt, as attention needs them.

    Attributes:
        index: the token at each place; where a prompt has fewer tokens than others, its first one stands in.
        place: the place of each token, counting through all prompts.
        positions: of the tokens in their prompts.
        plain: the tokens are in this order already, one for each prompt.
    """

    index: Int[Tensor, "batch place"]
    place: Int[Tensor, " token"]
    positions: Int[Tensor, "batch place"]
    plain: bool

    @staticmethod
    def of(prompt: Int[Tensor, " token"], position: Int[Tensor, " token"], batch: int) -> Layout:
        """The layout of some tokens."""
        order = torch.argsort(prompt * (int(position.max()) + 1) + position)
        counts = torch.bincount(prompt, minlength=batch)
        starts = counts.cumsum(0) - counts
        width = int(counts.max())
        offsets = torch.arange(width, device=prompt.device).expand(batch, width)
        index = order[
            (starts[:, None] + torch.where(offsets < counts[:, None], offsets, 0)).clamp(
                max=len(order) - 1
            )
        ]
        place = torch.empty_like(prompt)
        place[order] = (
            prompt[order] * width
            + torch.arange(len(prompt), device=prompt.device)
            - starts[prompt[order]]
        )
        plain = width == 1 and bool(
            (place == torch.arange(len(prompt), device=prompt.device)).all()
        )
        return Layout(index, place, position[index], plain)

    def to_prompts(
        self, rows: Float[Tensor, "*rows token width"]
    ) -> Float[Tensor, "*rows batch place width"]:
        """Tokens sorted by prompt."""
        if self.plain:
            return rows[..., :, None, :]
        return rows.index_select(-2, self.index.flatten()).unflatten(-2, self.index.shape)

    def to_tokens(
        self, rows: Float[Tensor, "*rows batch place width"]
    ) -> Float[Tensor, "*rows token width"]:
        """Tokens in their own order again."""
        flat = rows.flatten(-3, -2)
        return flat if self.plain else flat.index_select(-2, self.place)


@dataclass(frozen=True, eq=False)
class Window:
    """The tokens that are computed, all prompts' in one row, the scored ones last and in the order of the task's rows.

    Attributes:
        prompt, position: of each token.
        scored: how many are scored.
        readable: where there is something to attend to, at each position of each prompt.
        layouts: of the scored tokens, and of all.
    """

    prompt: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    scored: int
    readable: Bool[Tensor, "batch key"]
    layouts: tuple[Layout, Layout]

    @staticmethod
    def of(task: Task, *, causal: bool, from_first_difference: bool) -> Window:
        """The window of a task.

        Args:
            causal: whether attention is; otherwise every real token matters.
            from_first_difference: nothing changes before the first token in which clean and corrupted prompts differ.
        """
        batch, length = task.clean.shape
        index = torch.arange(length, device=task.clean.device)
        last = torch.where(task.scored if causal else task.mask, index, 0).amax(1, keepdim=True)
        first = torch.zeros_like(last)
        if causal and from_first_difference:
            first = torch.where(
                (task.clean != task.corrupted) | task.scored, index, length - 1
            ).amin(1, keepdim=True)
        inside = (index >= first) & (index <= last) & task.mask
        tokens = torch.cat([(inside & ~task.scored).nonzero(), task.scored.nonzero()])
        prompt, position = tokens.T.contiguous()
        scored = len(task.row_prompt)
        layouts = (
            Layout.of(prompt[-scored:], position[-scored:], batch),
            Layout.of(prompt, position, batch),
        )
        return Window(
            prompt,
            position,
            scored,
            (task.mask & (index <= last))[:, : int(last.max()) + 1],
            layouts,
        )

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.prompt)

    def cut(
        self, activation: Float[Tensor, "*rows batch pos width"]
    ) -> Float[Tensor, "*rows token width"]:
        """What stands at these tokens."""
        return activation[..., self.prompt, self.position, :]

    def within(self, other: Window) -> Int[Tensor, " token"]:
        """Where these tokens stand in a window that has them all."""
        table = torch.empty_like(other.readable, dtype=torch.long)
        table[other.prompt, other.position] = torch.arange(len(other), device=table.device)
        return table[self.prompt, self.position]

    def narrow(
        self, rows: Float[Tensor, "*rows token width"]
    ) -> Float[Tensor, "*rows scored width"]:
        """What stands at the scored tokens; a view."""
        return rows[..., -self.scored :, :]

    def at(self, wide: bool) -> Int[Tensor, " token"]:
        """Positions of all tokens, or of the scored ones."""
        return self.position if wide else self.position[-self.scored :]

    def put(
        self,
        into: Float[Tensor, "rows token width"],
        rows: HeadSelection,
        values: Tensor,
        wide: bool,
    ) -> None:
        """Write values at all tokens, or at the scored ones, of some rows."""
        (into if wide else self.narrow(into))[rows] = values

    def into_keys(
        self,
        known: Float[Tensor, "head batch key d_head"],
        found: Float[Tensor, "head variant token d_head"],
    ) -> Float[Tensor, "head variant batch key d_head"]:
        """Keys or values of whole prompts: new ones at these tokens, known ones elsewhere."""
        result = known.flatten(1, 2)[:, None].repeat(1, found.shape[1], 1, 1)
        return result.index_copy_(2, self.prompt * known.shape[2] + self.position, found).unflatten(
            2, known.shape[1:3]
        )
