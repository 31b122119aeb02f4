"""Which tokens of a task an incremental run computes: those that can change, up to the last one that matters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.sublayers import Rows
from circuits.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Window:
    """As many tokens of each prompt, ending with its last one that matters; tokens before them never change.

    Where a prompt has fewer, its first token stands in for those missing, and nothing attends to these copies.

    Attributes:
        positions: of the tokens in the window.
        before: how many tokens at most stand before the window.
        keys, readable: positions of all that may be attended to, those before the window first; and whether they are what they say.
        scored: where in the window each prompt is scored; prompts with fewer scored tokens repeat one.
        rows: which of the `scored` tokens, flattened, is each of the task's scored rows.
    """

    positions: Int[Tensor, "batch window"]
    before: int
    keys: Int[Tensor, "batch key"]
    readable: Bool[Tensor, "batch key"]
    scored: Int[Tensor, "batch scored"]
    rows: Int[Tensor, "row"]

    @staticmethod
    def of(task: Task, *, causal: bool, from_first_difference: bool) -> Window:
        """The window of a task.

        Args:
            causal: whether attention is; otherwise every token matters, and all can change.
            from_first_difference: clean and corrupted prompts are the only cause of change.
        """
        batch, length = task.clean.shape
        index = torch.arange(length, device=task.clean.device)
        last = torch.where(task.scored if causal else task.mask, index, 0).amax(1)
        first = torch.zeros_like(last)
        if causal and from_first_difference:
            first = torch.where(task.clean != task.corrupted, index, length).amin(1).minimum(last)
        width = int((last - first).max()) + 1
        start = last - width + 1
        wanted = start[:, None] + torch.arange(width, device=index.device)
        before = max(0, int(start.max()))
        earlier = index[:before].expand(batch, before)
        readable = torch.cat([earlier < start[:, None], (wanted >= 0) & task.mask.gather(1, wanted.clamp(min=0))], dim=1)
        keys = torch.cat([earlier, wanted.clamp(min=0)], dim=1)
        per_prompt = task.scored.sum(1)
        ordinal = task.scored.cumsum(1) - 1
        prompt, position = task.scored.nonzero().T
        scored = (last - start)[:, None].repeat(1, int(per_prompt.max()))
        scored[prompt, ordinal[prompt, position]] = position - start[prompt]
        rows = prompt * scored.shape[1] + ordinal[prompt, position]
        return Window(wanted.clamp(min=0), before, keys, readable, scored, rows)

    def cut(self, activation: Float[Tensor, "*rows batch pos width"]) -> Float[Tensor, "*rows batch window width"]:
        """What stands in the window."""
        return activation[..., self._prompts, self.positions, :]

    def narrow(self, activation: Float[Tensor, "*rows batch window width"]) -> Float[Tensor, "*rows batch scored width"]:
        """What stands at the scored tokens of the window."""
        if self.at_end:
            return activation[..., -1:, :]
        return activation[..., self._prompts, self.scored, :]

    def put(self, into: Float[Tensor, "rows batch window width"], rows: Rows, values: Tensor, wide: bool) -> None:
        """Write values at all tokens of the window, or at the scored ones, of some rows."""
        if wide:
            into[rows] = values
        elif self.at_end:
            into[rows, :, -1:] = values
        else:
            index = torch.arange(len(into), device=into.device)[rows]
            into[index[:, None, None], self._prompts, self.scored] = values

    def at(self, wide: bool) -> Int[Tensor, "batch token"]:
        """Positions of all tokens of the window, or of the scored ones."""
        return self.positions if wide else self.positions.gather(1, self.scored)

    @cached_property
    def at_end(self) -> bool:
        """Whether each prompt is scored once, at the last token of its window."""
        return self.scored.shape[1] == 1 and bool((self.scored == self.positions.shape[1] - 1).all())

    @cached_property
    def _prompts(self) -> Int[Tensor, "batch 1"]:
        return torch.arange(len(self.positions), device=self.positions.device)[:, None]
