"""Generation by iterative denoising (LLaDA, arXiv 2502.09992, algorithms 4 and 5; block diffusion, arXiv 2503.09573).

A canvas starts as the prompt followed by mask tokens. Each step predicts every masked token of the current block and keeps
some of the predictions: a number that is planned, the most confident or random ones, or all that are confident enough
(threshold decoding); the others stay masked. Blocks are filled left to right.

A model of masked diffusion reads the whole canvas at each step. Its blocks begin after the prompt; one block as long as the
generation is pure diffusion. Every token sees every other, so nothing can be kept from one step to the next.

A model of block diffusion reads the current block alone, with what it has kept of the finished ones. Its blocks are counted
from the start of the text, as in training: the first may begin with the prompt's last tokens, the last may be short.

The t given to the model is the share of mask tokens in what shares a t in training: the whole sequence, prompt and later blocks
included, or the current block. In training t is the probability with which *every* token of it is masked, so m masked tokens of
l are most likely under t = m / l; the model cannot tell a prompt from tokens that happened to stay clean. The share among
generated tokens alone would say t = 1 while half of the sequence is visible, a pair that training never shows.

Shapes: b = rows of one batch, p = prompt tokens, g = generated tokens, l = p + g, w = tokens of the current block,
v = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Protocol, get_args, get_type_hints, runtime_checkable

import torch
from torch import Tensor

from w1train.config.errors import UserError
from w1train.config.rules.sampling_rules import denoising_problems
from w1train.config.schema import SamplingConfig
from w1train.sampling.unmask import Unmasking, transfer_counts

logger = logging.getLogger(__name__)

Predict = Callable[[Tensor, Tensor], Tensor]
"""A masked-diffusion model: (tokens int64 [b, l], t float32 [b]) -> logits [b, l, v]. Rows have equal lengths and no padding."""


@runtime_checkable
class BlockPredict(Protocol):
    """A block-diffusion model (w1train.inference.predictor.BlockPredictor)."""

    @property
    def block_size(self) -> int:
        """Tokens of a block in training."""

    def start(self, length: int, block_size: int) -> None:
        """A new batch, of rows of ``length`` tokens."""

    def append(self, tokens: Tensor) -> None:
        """The next finished blocks, int64 [b, n]."""

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """The block after the finished ones, int64 [b, w], and t, float32 [b] -> logits [b, w, v]."""

    def select_rows(self, rows: Tensor) -> None:
        """Go on with some of the rows, int64 [new b]."""


_REMASKING = get_args(get_type_hints(SamplingConfig)["remasking"])


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """The state after a step, for watching."""

    step: int
    """1-based."""
    num_steps: int | None
    """Steps that this batch takes; None = as many as the threshold asks for."""
    rows: list[int]
    """Which prompts the batch holds (prompts of equal length go together; with block diffusion, those that have not ended)."""
    t: float
    """The t the model was given; the largest, where rows differ."""
    tokens: Tensor
    """int64 [b, l]; mask tokens where nothing is decided yet. A copy."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What came out, in the order of the prompts."""

    prompts: list[list[int]]
    completions: Tensor
    """int64 [number of prompts, g], on the CPU. What follows an EOS is kept here; EOS in blocks that were not needed any more."""
    num_forward_passes: list[int]
    """Passes that each prompt needed: denoising steps, and with block diffusion those that encode the prompt and finished blocks."""
    eos_token_id: int

    def completion(self, row: int) -> list[int]:
        """The generated tokens of a prompt up to the first EOS, which is left out."""
        return cut_at_eos(self.completions[row].tolist(), self.eos_token_id)


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """A block of the canvas and how it is filled."""

    start: int
    """First position; with block diffusion it may be one of the prompt's."""
    end: int
    counts: list[int] | None
    """Tokens that each step unmasks; None = as the threshold decides."""


@torch.no_grad()
def generate(
    model: Predict | BlockPredict,
    prompts: Sequence[Sequence[int]] | Tensor,
    config: SamplingConfig,
    *,
    mask_token_id: int,
    eos_token_id: int,
    device: torch.device | str,
    vocab_size: int | None = None,
    on_step: Callable[[DenoisingStep], None] | None = None,
) -> Generation:
    """Complete each prompt with ``config.num_tokens`` tokens.

    Prompts may differ in length: those of equal length run as one batch, one batch after the other, so the model never
    sees padding and a prompt's positions are its own. A prompt's noise depends on (config.seed, its place in
    ``prompts``) only, not on the other prompts.

    Args:
        model: logits may or may not leave out the mask token, which is never generated.
        prompts: token ids in [0, v) without mask tokens; a prompt may be empty.
        config: all but interval and prompts are used; num_steps only without a threshold.
        device: where the model takes its tokens.
        vocab_size: ids from here on are never generated (a model's vocabulary is often rounded up beyond the tokenizer's);
            None = every id of the model but the mask may be.
        on_step: called after every step of every batch.

    Returns:
        The completions. At temperature 0 each is a function of the prompt alone (with low-confidence remasking).

    Raises:
        UserError: for a setting that cannot work (all of them in one message), no prompt, or a prompt with mask tokens.
    """
    trained_block_size = model.block_size if isinstance(model, BlockPredict) else None
    _check_config(config, by_block=trained_block_size is not None)
    prompt_lists: list[list[int]] = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    _check_prompts(prompt_lists, mask_token_id)
    groups = list(_rows_of_equal_length(prompt_lists))
    plans = [plan_blocks(config, len(prompt_lists[rows[0]]), trained_block_size) for rows in groups]
    _say_what_differs(config, plans, trained_block_size)
    results = Generation(
        prompt_lists, torch.empty(len(prompt_lists), config.num_tokens, dtype=torch.int64), [0] * len(prompt_lists), eos_token_id
    )
    for rows, plan in zip(groups, plans, strict=True):
        prompt = torch.tensor([prompt_lists[row] for row in rows], dtype=torch.int64).reshape(len(rows), -1)
        canvas = torch.nn.functional.pad(prompt, (0, config.num_tokens), value=mask_token_id).to(device)
        source = _Blocks(model, canvas, config) if isinstance(model, BlockPredict) else _WholeCanvas(model)
        unmasking = Unmasking(config, rows, mask_token_id=mask_token_id, vocab_size=vocab_size, device=device)
        for state in _Batch(rows, canvas, source, unmasking, mask_token_id, results).denoise(plan):
            if on_step is not None:
                on_step(state)
    return results


def plan_blocks(config: SamplingConfig, prompt_length: int, trained_block_size: int | None = None) -> list[PlannedBlock]:
    """The blocks that hold generated tokens, in order.

    Steps are dealt to blocks by their masked tokens, rounded up; none has more steps than tokens. Blocks of masked diffusion are
    alike, so that each gets its share of ``num_steps``.

    Args:
        trained_block_size: of a block-diffusion model; None = masked diffusion.
    """
    block_size = config.block_size or trained_block_size or config.num_tokens
    length = prompt_length + config.num_tokens
    origin = prompt_length if trained_block_size is None else prompt_length // block_size * block_size
    plan = []
    for start in range(origin, length, block_size):
        end = min(start + block_size, length)
        num_masked = end - max(start, prompt_length)
        num_steps = min(num_masked, -(-num_masked * config.num_steps // config.num_tokens))
        plan.append(PlannedBlock(start, end, transfer_counts(num_masked, num_steps) if config.threshold is None else None))
    return plan


def cut_at_eos(tokens: list[int], eos_token_id: int) -> list[int]:
    """The tokens before the first EOS, or all of them."""
    return tokens[: tokens.index(eos_token_id)] if eos_token_id in tokens else tokens


class _WholeCanvas:
    """Masked diffusion: a pass over the whole canvas at each step."""

    stops_at_eos = False
    """A completion is kept whole, as LLaDA's generate gives it."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict

    def enter(self, _canvas: Tensor, _start: int) -> int:
        """Before the block at ``start``; how many passes that takes."""
        return 0

    def logits(self, canvas: Tensor, is_mask: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Of the block [b, w, v], and the t that the model was given, float32 [b]."""
        t = is_mask.sum(dim=1, dtype=torch.float32) / canvas.shape[1]
        logits = self._predict(canvas.clone(), t)
        assert logits.shape[:2] == canvas.shape, f"predict gave {tuple(logits.shape)} for tokens {tuple(canvas.shape)}"
        return logits[:, start:end], t


class _Blocks:
    """Block diffusion: a pass over the block at each step, and one over each finished block."""

    stops_at_eos = True

    def __init__(self, model: BlockPredict, canvas: Tensor, config: SamplingConfig) -> None:
        self._model, self._num_finished = model, 0
        model.start(canvas.shape[1], config.block_size or model.block_size)

    def enter(self, canvas: Tensor, start: int) -> int:
        """Everything before ``start`` is finished: at first whole blocks of the prompt, later the block before."""
        if start == self._num_finished:
            return 0
        self._model.append(canvas[:, self._num_finished : start].clone())
        self._num_finished = start
        return 1

    def logits(self, canvas: Tensor, is_mask: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """As _WholeCanvas.logits."""
        t = is_mask[:, start:end].sum(dim=1, dtype=torch.float32) / (end - start)
        return self._model.predict_block(canvas[:, start:end].clone(), t), t

    def select_rows(self, rows: Tensor) -> None:
        self._model.select_rows(rows)


class _Batch:
    """Prompts of equal length on their way through the blocks."""

    def __init__(
        self,
        rows: list[int],
        canvas: Tensor,
        source: _WholeCanvas | _Blocks,
        unmasking: Unmasking,
        mask_token_id: int,
        results: Generation,
    ) -> None:
        """canvas [b, l], one row for each prompt of ``rows``; what comes out is written to ``results``."""
        self.rows, self.canvas, self.source, self.unmasking = rows, canvas, source, unmasking
        self.mask_token_id, self.results = mask_token_id, results
        self.num_generated = results.completions.shape[1]

    def denoise(self, plan: list[PlannedBlock]) -> Iterator[DenoisingStep]:
        """Fill block after block."""
        planned = [len(block.counts) for block in plan if block.counts is not None]
        step = 0
        for block in plan:
            self._count(self.source.enter(self.canvas, block.start))
            for num_unmasked in repeat(None) if block.counts is None else block.counts:
                is_mask = self.canvas == self.mask_token_id
                open_rows = is_mask[:, block.start : block.end].any(dim=1)
                if not open_rows.any():
                    break
                logits, t = self.source.logits(self.canvas, is_mask, block.start, block.end)
                tokens = self.canvas[:, block.start : block.end]
                self.canvas[:, block.start : block.end] = self.unmasking.step(tokens, logits, num_unmasked)
                self._count(1, open_rows)
                step += 1
                yield DenoisingStep(step, sum(planned) or None, self.rows, t.max().item(), self.canvas.clone())
            self._retire(block.end)
            if not self.rows:
                return

    def _count(self, num_passes: int, rows: Tensor | None = None) -> None:
        """Passes of some rows, bool [b], or of all."""
        needed = repeat(True) if rows is None else rows.tolist()
        for row, is_needed in zip(self.rows, needed, strict=False):
            self.results.num_forward_passes[row] += num_passes * is_needed

    def _retire(self, end: int) -> None:
        """Write down the rows that are complete, up to ``end``, and go on with the others.

        An EOS in a finished block cuts everything after it, and no block depends on a later one in block diffusion.
        """
        generated = self.canvas[:, -self.num_generated :]
        num_finished = self.num_generated - (self.canvas.shape[1] - end)
        has_ended = (generated[:, :num_finished] == self.results.eos_token_id).any(dim=1) & self.source.stops_at_eos
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
        index = torch.tensor(places, device=self.canvas.device)
        self.rows, self.canvas = [self.rows[place] for place in places], self.canvas[index]
        self.unmasking.select_rows(places)
        assert isinstance(self.source, _Blocks), "in masked diffusion all rows end together"
        self.source.select_rows(index)


def _rows_of_equal_length(prompts: list[list[int]]) -> Iterator[list[int]]:
    """Indices of the prompts, grouped by length in the order in which the lengths first occur."""
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(row)
    yield from groups.values()


def _say_what_differs(config: SamplingConfig, plans: list[list[PlannedBlock]], trained_block_size: int | None) -> None:
    """From what was asked for, or from training."""
    if trained_block_size is not None and config.block_size not in (None, trained_block_size):
        _say_that_block_sizes_differ(config.block_size, trained_block_size)
    totals = {sum(len(block.counts) for block in plan if block.counts is not None) for plan in plans}
    for total in sorted(totals) if config.threshold is None else ():
        if total < config.num_steps:
            logger.info("%d of %d denoising steps have no token left to unmask and are skipped", config.num_steps - total, config.num_steps)
        elif total > config.num_steps:
            logger.info("%d denoising steps instead of %d: blocks that prompt or end cut short take whole steps", total, config.num_steps)


@cache
def _say_that_block_sizes_differ(block_size: int | None, trained: int) -> None:
    logger.warning("sampling.block_size is %s, but the model was trained with blocks of %d tokens: expect other text", block_size, trained)


def _check_prompts(prompts: list[list[int]], mask_token_id: int) -> None:
    if not prompts:
        raise UserError("no prompt given; an empty prompt ([]) generates from nothing")
    for row, prompt in enumerate(prompts):
        if mask_token_id in prompt:
            place = prompt.index(mask_token_id)
            raise UserError(f"prompt {row} has the mask token ({mask_token_id}) at position {place}; prompts must be clean tokens")


def _check_config(config: SamplingConfig, *, by_block: bool) -> None:
    """Raise one UserError that lists every setting that cannot work, with the values that would."""
    problems = [
        f"sampling.{name} is {value}; it must be at least 1"
        for name, value in (("num_tokens", config.num_tokens), ("num_steps", config.num_steps), ("block_size", config.block_size))
        if value is not None and value < 1
    ]
    if not 0 <= config.temperature < float("inf"):
        problems.append(f"sampling.temperature is {config.temperature}; it must be 0 (greedy) or a positive number")
    if config.threshold is not None and not 0 < config.threshold <= 1:
        problems.append(f"sampling.threshold is {config.threshold}; it must be a probability above 0, or null")
    if config.remasking not in _REMASKING:
        problems.append(f"sampling.remasking is {config.remasking!r}; valid: {', '.join(_REMASKING)}")
    if not problems:
        problems = [f"{problem.key} is {problem.found}; it must be {problem.valid}" for problem in denoising_problems(config, by_block)]
    if problems:
        raise UserError("; ".join(problems))
