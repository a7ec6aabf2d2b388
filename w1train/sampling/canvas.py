"""The canvas of a batch while it is denoised: prompts of equal length, their completions and their suffixes, block after block.

Shapes: b = rows of one batch, p = prompt tokens, g = generated tokens, s = tokens of the suffix, l = p + g + s, w = tokens of the current
block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat, takewhile
from typing import Any

import torch
from torch import Tensor

from w1train.sampling.kernel import Kernel
from w1train.sampling.model_passes import BlockPredict, Predict, source_of
from w1train.sampling.revisers import REVISERS, Reviser


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """The state of a batch after a step."""

    step: int
    """Number of the step, from 1."""
    num_steps: int | None
    """Steps that this batch takes; None = the predictions decide."""
    rows: list[int]
    """The prompts of the batch, which have equal lengths. With block diffusion, only those whose completion has not ended."""
    t: float
    """The t that the model was given, or the largest t if rows differ."""
    tokens: Tensor
    """int64 [b, l], a copy."""
    is_open: Tensor
    """bool [b, l]: positions that have no token yet, but the mask token."""
    is_revised: Tensor
    """bool [b, l]: positions that had another token before this step, and not the mask token."""
    start: int
    """First generated position: p."""
    end: int
    """First position after the generated positions: p + g."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The completions, in the order of the prompts."""

    prompts: list[list[int]]
    completions: Tensor
    """int64 [number of prompts, g], on the CPU. Tokens after an EOS, or another token that ends a completion, are kept; blocks that were
    skipped after such a token hold only EOS tokens."""
    num_forward_passes: list[int]
    """Passes that each prompt needed: denoising steps and revisions, and with block diffusion passes that encode the prompt and finished
    blocks."""
    eos_token_id: int
    other_end_ids: tuple[int, ...] = ()
    """Tokens beside EOS that end a completion."""

    def completion(self, row: int) -> list[int]:
        """Return the generated tokens of a prompt before the first token that ends a completion."""
        return cut_at_end(self.completions[row].tolist(), (self.eos_token_id, *self.other_end_ids))

    def is_end(self, tokens: Tensor) -> Tensor:
        """Tell for each token whether it ends a completion, bool of the shape of ``tokens``."""
        found = tokens == self.eos_token_id
        for token_id in self.other_end_ids:
            found = found | (tokens == token_id)
        return found


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """A block of the canvas, with its steps."""

    start: int
    """First position. With block diffusion it may be a position of the prompt."""
    end: int
    """First position after the block."""
    steps: Sequence[Any] | None
    """The steps, as the kernel takes them; None = the predictions decide how many there are."""


class Canvas:
    """Prompts of equal length, while their completions are generated."""

    def __init__(
        self, model: Predict | BlockPredict, kernel: Kernel, tokens: Tensor, is_open: Tensor, start: int, results: Generation
    ) -> None:
        """
        Args:
            tokens: int64 [b, l], one row for each row of the kernel's batch.
            is_open: bool [b, l], positions whose token is not decided yet. The tokens there do not mark them: not every noise process
                has a mask token.
            start: first generated position.
            results: where the completions are written.
        """
        batch = kernel.batch
        self.kernel, self.tokens, self.is_open, self.start, self.results = kernel, tokens, is_open, start, results
        self.rows, self._mask_token_id = batch.rows, batch.diffusion.mask_token_id
        self.source = source_of(model, tokens.shape[1], batch.config, batch.diffusion)
        self.reviser: Reviser | None = None if batch.config.reviser is None else REVISERS[batch.config.reviser](batch)
        self.num_generated = results.completions.shape[1]

    def denoise(self, plan: Sequence[PlannedBlock]) -> Iterator[DenoisingStep]:
        """Fill block after block, and revise what is filled: the whole text at its end, or with block diffusion each block."""
        num_steps = num_planned_steps(plan) if self.reviser is None else None
        end, step = self.start + self.num_generated, 0
        for block in plan:
            self._count(self.source.enter(self.tokens, block.start))
            is_final = self.source.by_block or block is plan[-1]
            tokens, is_open = self._shown()
            for t in chain(self._fill(block), self._revise(block) if is_final else ()):
                before, was_open = tokens, is_open
                tokens, is_open = self._shown()
                step += 1
                is_revised = (tokens != before) & ~was_open
                yield DenoisingStep(step, num_steps, self.rows, t, tokens, is_open, is_revised, self.start, end)
            self._retire(block.end)
            if not self.rows:
                return

    def _shown(self) -> tuple[Tensor, Tensor]:
        """Return copies of the tokens, and of which positions have no token yet."""
        return self.tokens.clone(), self.is_open & (self.tokens == self._mask_token_id)

    def _fill(self, block: PlannedBlock) -> Iterator[float]:
        """Take the steps of a block. Yield the t of each step."""
        part = slice(block.start, block.end)
        for step in repeat(None) if block.steps is None else block.steps:
            tokens, is_open = self.tokens[:, part], self.is_open[:, part]
            open_rows = is_open.any(dim=1)
            if not open_rows.any():
                return
            noised = self.is_open.double()
            noised[:, part] = self.kernel.noised(is_open, step)
            t = self.source.timesteps(noised, block.start, block.end)
            logits = self.source.logits(self.tokens, t, block.start, block.end)
            tokens[:], is_open[:] = self.kernel.step(tokens, is_open, logits, step)
            self._count(1, open_rows)
            yield t.max().item()

    def _revise(self, block: PlannedBlock) -> Iterator[float]:
        """Let the reviser change what is finished: the block, or all generated tokens. Yield the t of each pass."""
        if self.reviser is None:
            return
        start, end = (block.start, block.end) if self.source.by_block else (self.start, self.start + self.num_generated)

        def predict(tokens: Tensor, timesteps: Tensor) -> Tensor:
            self.tokens[:, start:end] = tokens
            return self.source.logits(self.tokens, timesteps, start, end)

        may_change = torch.arange(start, end, device=self.tokens.device).expand(len(self.rows), -1) >= self.start
        for revision in self.reviser.revise(self.tokens[:, start:end].clone(), may_change, predict):
            self.tokens[:, start:end] = revision.tokens
            self._count(1, revision.needed)
            yield revision.t

    def _count(self, num_passes: int, rows: Tensor | None = None) -> None:
        """Count passes for some rows, bool [b], or for all rows."""
        needed = repeat(True) if rows is None else rows.tolist()
        for row, is_needed in zip(self.rows, needed, strict=False):
            self.results.num_forward_passes[row] += num_passes * is_needed

    def _retire(self, end: int) -> None:
        """Write complete rows to the results, with the tokens before ``end``, and keep the other rows.

        In block diffusion a row with an EOS, or another token that ends a completion, in a finished block is complete, because everything
        after such a token is cut off and no block depends on a later one.
        """
        generated = self.tokens[:, self.start : self.start + self.num_generated]
        num_finished = end - self.start
        has_ended = self.results.is_end(generated[:, :num_finished]).any(dim=1) & self.source.by_block
        if num_finished == self.num_generated:
            has_ended = torch.ones_like(has_ended)
        if not has_ended.any():
            return
        done = [place for place, ended in enumerate(has_ended.tolist()) if ended]
        for place in done:
            completion = self.results.completions[self.rows[place]]
            completion[:num_finished] = generated[place, :num_finished].cpu()
            completion[num_finished:] = self.results.eos_token_id
        self._select([place for place in range(len(self.rows)) if place not in done])

    def _select(self, places: list[int]) -> None:
        if not places:
            self.rows = []
            return
        index = torch.tensor(places, device=self.tokens.device)
        self.rows = [self.rows[place] for place in places]
        self.tokens, self.is_open = self.tokens[index], self.is_open[index]
        self.kernel.select_rows(places)
        if self.reviser is not None:
            self.reviser.select_rows(places)
        self.source.select_rows(index)


def num_planned_steps(plan: Sequence[PlannedBlock]) -> int | None:
    """Return how many steps the blocks have; None = the predictions decide."""
    lengths = [len(block.steps) for block in plan if block.steps is not None]
    return sum(lengths) if len(lengths) == len(plan) else None


def cut_at_end(tokens: list[int], end_token_ids: Collection[int]) -> list[int]:
    """Return the tokens before the first token that ends a completion, or all tokens if there is no such token."""
    return list(takewhile(lambda token: token not in end_token_ids, tokens))
