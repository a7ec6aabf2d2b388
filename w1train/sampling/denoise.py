"""Generation by iterative denoising (LLaDA, arXiv 2502.09992, algorithms 4 and 5; block diffusion, arXiv 2503.09573).

A canvas starts as the prompt followed by mask tokens, and the canvas has a second tensor that says which positions are still open. Each
step predicts the token of every open position in the current block. It keeps some of the predictions: a planned number of predictions (the
most confident, or random ones), or all predictions that are confident enough (threshold decoding). The other positions stay open. Blocks
are filled from left to right.

A model of masked diffusion reads the whole canvas at each step. Its blocks begin after the prompt; with one block as long as the
generation, sampling is diffusion without an order of blocks. Every token sees every other token, so no keys or values can be kept between
steps. The canvas may end with a suffix, which is clean from the start: the model then fills in the text between prompt and suffix.

A model of block diffusion reads the current block alone, with the keys and values that it has kept of the finished blocks. Its blocks are
counted from the start of the text: the first block may begin with the last tokens of the prompt, and the last block may be short. Training
counts in the same way with diffusion.block_index=document, and with block_index=sample for documents that begin where a block begins. A
block does not see the blocks after it, so there can be no suffix.

The t given to the model has as its noising probability the share of open positions among the tokens that share a t in training: the
whole sequence, prompt and later blocks included, or the current block. In training *every* such token is masked with this probability, so
m masked tokens of l are most likely under the probability m / l, and the model cannot distinguish a prompt from tokens that happened to
stay clean. The share among generated tokens alone would be 1 while half of the sequence is visible, a combination that training never
shows.

Shapes: b = rows of one batch, p = prompt tokens, g = generated tokens, s = tokens of the suffix, l = p + g + s, w = tokens of the current
block, v = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from w1train.config.errors import UserError
from w1train.config.rules.sampling_rules import denoising_problems, threshold_problems
from w1train.config.schema import SamplingConfig
from w1train.sampling.rules import ORDERS, count_of
from w1train.sampling.unmask import Unmasking

logger = logging.getLogger(__name__)

Predict = Callable[[Tensor, Tensor], Tensor]
"""A masked-diffusion model: (tokens int64 [b, l], t float32 [b]) -> logits [b, l, v]. Rows have equal lengths and no padding."""


TimestepAt = Callable[[Tensor], Tensor]
"""NoiseProcess.timestep_at: the t of noising probabilities, float32 [b]."""


@runtime_checkable
class BlockPredict(Protocol):
    """A block-diffusion model (w1train.inference.predictor.BlockPredictor)."""

    @property
    def block_size(self) -> int:
        """The number of tokens that a block had in training."""

    def start(self, length: int, block_size: int) -> None:
        """Start a new batch, of rows of ``length`` tokens."""

    def append(self, tokens: Tensor) -> None:
        """Keep the next finished blocks, int64 [b, n]."""

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """Return logits [b, w, v] of the block after the finished blocks, from its tokens, int64 [b, w], and t, float32 [b]."""

    def select_rows(self, rows: Tensor) -> None:
        """Keep some of the rows, int64 [new b]; the others have ended."""


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
    """bool [b, l]: positions whose token is not decided yet. A copy."""
    start: int
    """First generated position: p."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The completions, in the order of the prompts."""

    prompts: list[list[int]]
    completions: Tensor
    """int64 [number of prompts, g], on the CPU. Tokens after an EOS are kept; blocks that were skipped after an EOS hold only EOS
    tokens."""
    num_forward_passes: list[int]
    """Passes that each prompt needed: denoising steps, and with block diffusion passes that encode the prompt and finished blocks."""
    eos_token_id: int

    def completion(self, row: int) -> list[int]:
        """Return the generated tokens of a prompt before the first EOS."""
        return cut_at_eos(self.completions[row].tolist(), self.eos_token_id)


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """A block of the canvas, with the number of tokens that each step decides."""

    start: int
    """First position. With block diffusion it may be a position of the prompt."""
    end: int
    """First position after the block."""
    counts: list[int] | None
    """Tokens that each step decides; None = the predictions decide how many."""


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
    timestep_at: TimestepAt | None = None,
    suffixes: Sequence[Sequence[int]] | None = None,
    on_step: Callable[[DenoisingStep], None] | None = None,
) -> Generation:
    """Complete each prompt with ``config.num_tokens`` tokens, or fill in so many tokens between each prompt and its suffix.

    Rows of equal lengths run as one batch, and batches run one after the other. The model therefore never sees padding. Neither the
    positions of a prompt nor its noise depend on other prompts: the noise depends on config.seed and on the prompt's place in ``prompts``.

    Args:
        model: its logits may be -inf at the mask token or not; the mask token is never generated.
        prompts: token ids in [0, v) without mask tokens; a prompt may be empty.
        config: all fields except interval and prompts are used; num_steps is used only without a threshold.
        device: where the model takes its tokens.
        vocab_size: ids from this number on are never generated, because the vocabulary of a model is often larger than the tokenizer's;
            None = every id of the model except the mask token may be generated.
        timestep_at: of the model's noise process; None = t is the noising probability, as in linear masked diffusion.
        suffixes: token ids of the text after each generation, as for the prompts; ``config.num_tokens`` may then be 0. None = no suffixes.
        on_step: called after every step of every batch.

    Returns:
        The completions. At temperature 0, with low-confidence remasking, a completion is a function of its prompt alone.

    Raises:
        UserError: settings cannot work (one message lists all of them), there is no prompt, a prompt or suffix has mask tokens, or the
            model cannot see a suffix.
    """
    trained_block_size = model.block_size if isinstance(model, BlockPredict) else None
    _check_config(config, by_block=trained_block_size is not None, fewest_tokens=1 if suffixes is None else 0)
    prompt_lists: list[list[int]] = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    suffix_lists: list[list[int]] = [[] for _ in prompt_lists] if suffixes is None else [list(suffix) for suffix in suffixes]
    _check_prompts(prompt_lists, suffix_lists, mask_token_id, trained_block_size)
    groups = list(_rows_of_equal_lengths(prompt_lists, suffix_lists))
    plans = [plan_blocks(config, len(prompt_lists[rows[0]]), trained_block_size) for rows in groups]
    _say_what_differs(config, plans, trained_block_size)
    results = Generation(
        prompt_lists, torch.empty(len(prompt_lists), config.num_tokens, dtype=torch.int64), [0] * len(prompt_lists), eos_token_id
    )
    for rows, plan in zip(groups, plans, strict=True):
        start, masks = len(prompt_lists[rows[0]]), [mask_token_id] * config.num_tokens
        canvas = torch.tensor([prompt_lists[row] + masks + suffix_lists[row] for row in rows], dtype=torch.int64, device=device)
        is_open = torch.zeros_like(canvas, dtype=torch.bool)
        is_open[:, start : start + config.num_tokens] = True
        at = timestep_at or _linear
        source = _Blocks(model, canvas, config, at) if isinstance(model, BlockPredict) else _WholeCanvas(model, at)
        unmasking = Unmasking(config, rows, mask_token_id=mask_token_id, vocab_size=vocab_size, device=device)
        for state in _Batch(rows, start, canvas, is_open, source, unmasking, results).denoise(plan):
            if on_step is not None:
                on_step(state)
    return results


def plan_blocks(config: SamplingConfig, prompt_length: int, trained_block_size: int | None = None) -> list[PlannedBlock]:
    """Return the blocks that have generated tokens, in order.

    A block has a share of ``num_steps`` in proportion to its generated tokens, rounded up, and never more steps than tokens. Blocks of
    masked diffusion have equally many tokens, so their shares are equal.

    Args:
        trained_block_size: block size of a block-diffusion model in training; None = masked diffusion.
    """
    if config.num_tokens == 0:
        return []
    block_size = config.block_size or trained_block_size or config.num_tokens
    length = prompt_length + config.num_tokens
    origin = prompt_length if trained_block_size is None else prompt_length // block_size * block_size
    plan, count = [], count_of(config)
    for start in range(origin, length, block_size):
        end = min(start + block_size, length)
        num_masked = end - max(start, prompt_length)
        num_steps = min(num_masked, -(-num_masked * config.num_steps // config.num_tokens))
        plan.append(PlannedBlock(start, end, count.planned(num_masked, num_steps)))
    return plan


def _linear(noising_probability: Tensor) -> Tensor:
    return noising_probability


def cut_at_eos(tokens: list[int], eos_token_id: int) -> list[int]:
    """Return the tokens before the first EOS, or all tokens if there is no EOS."""
    return tokens[: tokens.index(eos_token_id)] if eos_token_id in tokens else tokens


class _WholeCanvas:
    """Logits of a masked-diffusion model, from a pass over the whole canvas at each step."""

    stops_at_eos = False
    """False: a completion is generated to its end, as in LLaDA's generate. True: it ends with the block that has its first EOS."""

    def __init__(self, predict: Predict, timestep_at: TimestepAt) -> None:
        self._predict, self._timestep_at = predict, timestep_at

    def enter(self, _canvas: Tensor, _start: int) -> int:
        """Prepare for the block at ``start``; return how many passes this took."""
        return 0

    def logits(self, canvas: Tensor, is_open: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the logits of the block, [b, w, v], and the t that the model was given, float32 [b]."""
        t = self._timestep_at(is_open.sum(dim=1, dtype=torch.float32) / canvas.shape[1])
        logits = self._predict(canvas.clone(), t)
        assert logits.shape[:2] == canvas.shape, f"predict gave {tuple(logits.shape)} for tokens {tuple(canvas.shape)}"
        return logits[:, start:end], t


class _Blocks:
    """Logits of a block-diffusion model, from a pass over the block at each step, and one pass over each finished block."""

    stops_at_eos = True

    def __init__(self, model: BlockPredict, canvas: Tensor, config: SamplingConfig, timestep_at: TimestepAt) -> None:
        self._model, self._num_finished, self._timestep_at = model, 0, timestep_at
        model.start(canvas.shape[1], config.block_size or model.block_size)

    def enter(self, canvas: Tensor, start: int) -> int:
        """Let the model keep the keys and values of the tokens before ``start`` that it does not have yet: first the whole blocks of the
        prompt, later the block that was just finished."""
        if start == self._num_finished:
            return 0
        self._model.append(canvas[:, self._num_finished : start].clone())
        self._num_finished = start
        return 1

    def logits(self, canvas: Tensor, is_open: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return what _WholeCanvas.logits returns, from a pass over the block."""
        t = self._timestep_at(is_open[:, start:end].sum(dim=1, dtype=torch.float32) / (end - start))
        return self._model.predict_block(canvas[:, start:end].clone(), t), t

    def select_rows(self, rows: Tensor) -> None:
        self._model.select_rows(rows)


class _Batch:
    """Prompts of equal length, while their completions are generated."""

    def __init__(
        self,
        rows: list[int],
        start: int,
        canvas: Tensor,
        is_open: Tensor,
        source: _WholeCanvas | _Blocks,
        unmasking: Unmasking,
        results: Generation,
    ) -> None:
        """
        Args:
            start: first generated position.
            canvas: int64 [b, l], one row for each prompt of ``rows``.
            is_open: bool [b, l], positions whose token is not decided yet. The tokens there do not mark them: not every noise process
                has a mask token.
            results: where the completions are written.
        """
        self.rows, self.start, self.canvas, self.is_open, self.source, self.unmasking = rows, start, canvas, is_open, source, unmasking
        self.results = results
        self.num_generated = results.completions.shape[1]

    def denoise(self, plan: list[PlannedBlock]) -> Iterator[DenoisingStep]:
        """Fill block after block."""
        planned = [len(block.counts) for block in plan if block.counts is not None]
        step = 0
        for block in plan:
            self._count(self.source.enter(self.canvas, block.start))
            for num_planned in repeat(None) if block.counts is None else block.counts:
                tokens, is_open = self.canvas[:, block.start : block.end], self.is_open[:, block.start : block.end]
                open_rows = is_open.any(dim=1)
                if not open_rows.any():
                    break
                logits, t = self.source.logits(self.canvas, self.is_open, block.start, block.end)
                tokens[:], is_open[:] = self.unmasking.step(tokens, is_open, logits, num_planned)
                self._count(1, open_rows)
                step += 1
                canvas, is_open = self.canvas.clone(), self.is_open.clone()
                yield DenoisingStep(step, sum(planned) or None, self.rows, t.max().item(), canvas, is_open, self.start)
            self._retire(block.end)
            if not self.rows:
                return

    def _count(self, num_passes: int, rows: Tensor | None = None) -> None:
        """Count passes for some rows, bool [b], or for all rows."""
        needed = repeat(True) if rows is None else rows.tolist()
        for row, is_needed in zip(self.rows, needed, strict=False):
            self.results.num_forward_passes[row] += num_passes * is_needed

    def _retire(self, end: int) -> None:
        """Write complete rows to the results, with the tokens before ``end``, and keep the other rows.

        In block diffusion a row with an EOS in a finished block is complete, because everything after an EOS is cut off and no block
        depends on a later one.
        """
        generated = self.canvas[:, self.start : self.start + self.num_generated]
        num_finished = end - self.start
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
        self.rows = [self.rows[place] for place in places]
        self.canvas, self.is_open = self.canvas[index], self.is_open[index]
        self.unmasking.select_rows(places)
        assert isinstance(self.source, _Blocks), "in masked diffusion all rows end together"
        self.source.select_rows(index)


def _rows_of_equal_lengths(prompts: list[list[int]], suffixes: list[list[int]]) -> Iterator[list[int]]:
    """Yield the indices of prompts and suffixes of each pair of lengths, in the order in which the pairs first occur."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (prompt, suffix) in enumerate(zip(prompts, suffixes, strict=True)):
        groups.setdefault((len(prompt), len(suffix)), []).append(row)
    yield from groups.values()


def _say_what_differs(config: SamplingConfig, plans: list[list[PlannedBlock]], trained_block_size: int | None) -> None:
    """Log where the plan differs from the settings, or from training."""
    if trained_block_size is not None and config.block_size not in (None, trained_block_size):
        _say_that_block_sizes_differ(config.block_size, trained_block_size)
    totals = {sum(len(block.counts or ()) for block in plan) for plan in plans if all(block.counts is not None for block in plan)}
    for total in sorted(totals):
        if total < config.num_steps:
            logger.info("%d of %d denoising steps have no token left to unmask and are skipped", config.num_steps - total, config.num_steps)
        elif total > config.num_steps:
            logger.info("%d denoising steps instead of %d: steps are rounded up in blocks that are cut short", total, config.num_steps)


@cache
def _say_that_block_sizes_differ(block_size: int | None, trained: int) -> None:
    logger.warning("sampling.block_size is %s, but the model was trained with blocks of %d tokens: expect other text", block_size, trained)


def _check_prompts(prompts: list[list[int]], suffixes: list[list[int]], mask_token_id: int, trained_block_size: int | None) -> None:
    if not prompts:
        raise UserError("no prompt given; an empty prompt ([]) generates from nothing")
    if len(suffixes) != len(prompts):
        raise UserError(f"there are {len(suffixes)} suffixes for {len(prompts)} prompts; each prompt needs its own")
    if trained_block_size is not None and any(suffixes):
        raise UserError(
            f"the model denoises blocks of {trained_block_size} tokens, and a block does not see the blocks after it: no text can be "
            "filled in before a suffix. A checkpoint of a stage of masked diffusion (diffusion.block_size=null) can fill it in"
        )
    for what, texts in (("prompt", prompts), ("suffix", suffixes)):
        for row, text in enumerate(texts):
            if mask_token_id in text:
                place = text.index(mask_token_id)
                raise UserError(f"{what} {row} has the mask token ({mask_token_id}) at position {place}; it must have clean tokens alone")


def _check_config(config: SamplingConfig, *, by_block: bool, fewest_tokens: int) -> None:
    """Raise one UserError that lists every setting that cannot work, with the values that would."""
    smallest = {"num_tokens": fewest_tokens, "num_steps": 1, "block_size": 1}
    problems = [
        f"sampling.{name} is {value}; it must be at least {least}"
        for name, least in smallest.items()
        if (value := getattr(config, name)) is not None and value < least
    ]
    if not 0 <= config.temperature < float("inf"):
        problems.append(f"sampling.temperature is {config.temperature}; it must be 0 (greedy) or a positive number")
    if config.threshold is not None and not 0 < config.threshold <= 1:
        problems.append(f"sampling.threshold is {config.threshold}; it must be a probability above 0, or null")
    if config.remasking not in ORDERS:
        problems.append(f"sampling.remasking is {config.remasking!r}; valid: {', '.join(ORDERS)}")
    if not problems and config.num_tokens > 0:
        found = [*threshold_problems(config, ORDERS[config.remasking].are_log_probabilities), *denoising_problems(config, by_block)]
        problems = [f"{problem.key} is {problem.found}; it must be {problem.valid}" for problem in found]
    if problems:
        raise UserError("; ".join(problems))
