"""Generation by iterative denoising (LLaDA, arXiv 2502.09992, algorithms 4 and 5; block diffusion, arXiv 2503.09573).

A canvas starts as the prompt followed by noise, and the canvas has a second tensor that says which positions are still open. Blocks are
filled from left to right. In each step the model reads the canvas, and a kernel (w1train/sampling/kernel.py) says what changes. The kernel
of masked diffusion starts from mask tokens, and keeps some predictions of each step: a planned number of predictions (the most confident,
or random ones), or all predictions that are confident enough (threshold decoding). The other positions stay open. The ancestral kernel goes
through the timesteps of any process, and may change a token of the block more than once. A reviser may change a text that is finished: the
whole text, or with block diffusion each block before the next block begins.

A model of one stream reads the whole canvas at each step. Its blocks begin after the prompt; with one block as long as the
generation, sampling is diffusion without an order of blocks. Every token sees every other token, so no keys or values can be kept between
steps. The canvas may end with a suffix, which is clean from the start: the model then fills in the text between prompt and suffix.

A model of block diffusion reads the current block alone, with the keys and values that it has kept of the finished blocks. Its blocks are
counted from the start of the text: the first block may begin with the last tokens of the prompt, and the last block may be short. Training
counts in the same way with diffusion.block_index=document, and with block_index=sample for documents that begin where a block begins. A
block does not see the blocks after it, so there can be no suffix.

The t given to the model has as its noising probability the share of noised tokens among the tokens that share a t in training: the
whole sequence, prompt and later blocks included, or the current block. In training *every* such token is noised with this probability, so
m noised tokens of l are most likely under the probability m / l, and the model cannot distinguish a prompt from tokens that happened to
stay clean. The share among generated tokens alone would be 1 while half of the sequence is visible, a combination that training never
shows. Where tokens do not show whether they are noise, the kernel says how many noised tokens it expects.

Shapes: b = rows of one batch, p = prompt tokens, g = generated tokens, s = tokens of the suffix, l = p + g + s, w = tokens of the current
block, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.config.schema_sampling import SamplingConfig
from w1train.sampling.canvas import Canvas, DenoisingStep, Generation, PlannedBlock
from w1train.sampling.checks import check_given, check_settings, refuse_suffixes_of_blocks, say_what_differs
from w1train.sampling.kernel import Batch, Kernel
from w1train.sampling.kernels import KERNELS, kernel_name
from w1train.sampling.model_passes import BlockPredict, HasNoiseRates, Predict

OnStep = Callable[[DenoisingStep], None]
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Revised:
    """Texts after a revision, in the order in which they were given."""

    texts: list[list[int]]
    num_forward_passes: list[int]
    """Passes that each text needed."""


@torch.no_grad()
def generate(
    model: Predict | BlockPredict,
    prompts: Sequence[Sequence[int]] | Tensor,
    config: SamplingConfig,
    *,
    diffusion: DiffusionConfig,
    eos_token_id: int,
    device: torch.device | str,
    vocab_size: int | None = None,
    suffixes: Sequence[Sequence[int]] | None = None,
    other_end_ids: tuple[int, ...] = (),
    on_step: OnStep | None = None,
) -> Generation:
    """Complete each prompt with ``config.num_tokens`` tokens, or fill in so many tokens between each prompt and its suffix.

    Rows of equal lengths run as one batch, and batches run one after the other. The model therefore never sees padding. Neither the
    positions of a prompt nor its noise depend on other prompts: the noise depends on config.seed and on the prompt's place in ``prompts``.

    Args:
        model: its logits may be -inf at the mask token or not; the mask token is never generated. A model whose process has learned rates
            also has ``noise_rates`` (w1train.sampling.model_passes.HasNoiseRates), which the ancestral kernel needs.
        prompts: token ids in [0, v) without mask tokens; a prompt may be empty.
        config: all fields except interval and prompts are used; num_steps is used only without a threshold.
        diffusion: the noise process, the mask token and the prediction of the model.
        device: where the model takes its tokens.
        vocab_size: ids from this number on are never generated, because the vocabulary of a model is often larger than the tokenizer's;
            None = every id of the model except the mask token may be generated.
        suffixes: token ids of the text after each generation, as for the prompts; ``config.num_tokens`` may then be 0. None = no suffixes.
        other_end_ids: tokens that end a completion as EOS does, such as the token that ends a turn of a conversation.
        on_step: called after every step of every batch.

    Returns:
        The completions. At temperature 0, with the kernel unmask and low-confidence remasking, a completion is a function of its prompt
        alone.

    Raises:
        UserError: settings cannot work (one message lists all of them), there is no prompt, a prompt or suffix has mask tokens, or the
            model cannot see a suffix.
    """
    trained_block_size = model.block_size if isinstance(model, BlockPredict) else None
    check_settings(config, diffusion, by_block=trained_block_size is not None, fewest_tokens=1 if suffixes is None else 0)
    prompt_lists = _lists(prompts)
    suffix_lists: list[list[int]] = [[] for _ in prompt_lists] if suffixes is None else _lists(suffixes)
    check_given(prompt_lists, suffix_lists, ("suffix", "suffixes"), diffusion.mask_token_id)
    refuse_suffixes_of_blocks(suffix_lists, trained_block_size)
    groups = list(_rows_of_equal_lengths(prompt_lists, suffix_lists))
    make_kernel = KERNELS[kernel_name(config, diffusion)]
    rates = model.noise_rates() if isinstance(model, HasNoiseRates) else None
    kernels = [make_kernel(Batch(config, diffusion, rows, vocab_size, device, rates)) for rows in groups]
    lengths = [len(prompt_lists[rows[0]]) for rows in groups]
    plans = [plan_blocks(config, kernel.plan, length, trained_block_size) for kernel, length in zip(kernels, lengths, strict=True)]
    say_what_differs(config, plans, trained_block_size)
    completions = torch.empty(len(prompt_lists), config.num_tokens, dtype=torch.int64)
    results = Generation(prompt_lists, completions, [0] * len(prompt_lists), eos_token_id, other_end_ids)
    for kernel, length, plan in zip(kernels, lengths, plans, strict=True):
        tokens, is_open = _first_canvas(kernel, prompt_lists, suffix_lists)
        _run(Canvas(model, kernel, tokens, is_open, length, results), plan, on_step)
    return results


@torch.no_grad()
def revise(
    model: Predict | BlockPredict,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    diffusion: DiffusionConfig,
    device: torch.device | str,
    vocab_size: int | None = None,
    on_step: OnStep | None = None,
) -> Revised:
    """Revise the text after each prompt by ``config.reviser``, or by conditional modes if it is null. Prompts do not change.

    Args:
        model, diffusion, device, vocab_size, on_step: as in ``generate``.
        texts: token ids of the text after each prompt, without mask tokens.

    Raises:
        UserError: settings cannot work, there is no prompt, or a prompt or text has mask tokens.
    """
    trained_block_size = model.block_size if isinstance(model, BlockPredict) else None
    config = replace(config, reviser=config.reviser or "conditional_modes", block_size=config.block_size if trained_block_size else None)
    check_settings(replace(config, num_tokens=0), diffusion, by_block=True, fewest_tokens=0)
    prompt_lists, text_lists = _lists(prompts), _lists(texts)
    check_given(prompt_lists, text_lists, ("text", "texts"), diffusion.mask_token_id)
    revised = Revised([list(text) for text in text_lists], [0] * len(text_lists))
    for rows in _rows_of_equal_lengths(prompt_lists, text_lists):
        start, length = len(prompt_lists[rows[0]]), len(text_lists[rows[0]])
        results = Generation(prompt_lists, torch.empty(len(text_lists), length, dtype=torch.int64), revised.num_forward_passes, _NO_TOKEN)
        tokens = torch.tensor([prompt_lists[row] + text_lists[row] for row in rows], dtype=torch.int64, device=device)
        # The kernel has no step to take, because no position is open.
        kernel = KERNELS[kernel_name(config, diffusion)](Batch(config, diffusion, rows, vocab_size, device))
        plan = plan_blocks(replace(config, num_tokens=length), lambda *_: [], start, trained_block_size)
        _run(Canvas(model, kernel, tokens, torch.zeros_like(tokens, dtype=torch.bool), start, results), plan, on_step)
        for row in rows:
            revised.texts[row] = results.completions[row].tolist()
    return revised


def plan_blocks(
    config: SamplingConfig,
    plan: Callable[[int, int], Sequence[Any] | None],
    prompt_length: int,
    trained_block_size: int | None = None,
) -> list[PlannedBlock]:
    """Return the blocks that have generated tokens, in order.

    A block has a share of ``num_steps`` in proportion to its generated tokens, rounded up. Blocks of masked diffusion have equally many
    tokens, so their shares are equal.

    Args:
        plan: Kernel.plan.
        trained_block_size: block size of a block-diffusion model in training; None = a model of one stream.
    """
    if config.num_tokens == 0:
        return []
    block_size = config.block_size or trained_block_size or config.num_tokens
    length = prompt_length + config.num_tokens
    origin = prompt_length if trained_block_size is None else prompt_length // block_size * block_size
    blocks = []
    for start in range(origin, length, block_size):
        end = min(start + block_size, length)
        num_open = end - max(start, prompt_length)
        blocks.append(PlannedBlock(start, end, plan(num_open, -(-num_open * config.num_steps // config.num_tokens))))
    return blocks


def _first_canvas(kernel: Kernel, prompts: list[list[int]], suffixes: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return the tokens before the first step, int64 [b, l], and which of them are open, bool [b, l]."""
    batch, num_tokens = kernel.batch, kernel.config.num_tokens
    prompt, suffix = (
        torch.tensor([texts[row] for row in batch.rows], dtype=torch.int64, device=batch.device) for texts in (prompts, suffixes)
    )
    tokens = torch.cat([prompt, kernel.first_tokens(num_tokens), suffix], dim=1)
    is_open = torch.zeros_like(tokens, dtype=torch.bool)
    is_open[:, prompt.shape[1] : prompt.shape[1] + num_tokens] = True
    return tokens, is_open


def _run(canvas: Canvas, plan: Sequence[PlannedBlock], on_step: OnStep | None) -> None:
    for state in canvas.denoise(plan):
        if on_step is not None:
            on_step(state)


def _lists(texts: Sequence[Sequence[int]] | Tensor) -> list[list[int]]:
    return texts.tolist() if isinstance(texts, Tensor) else [list(text) for text in texts]


def _rows_of_equal_lengths(prompts: list[list[int]], suffixes: list[list[int]]) -> Iterator[list[int]]:
    """Yield the indices of prompts and suffixes of each pair of lengths, in the order in which the pairs first occur."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (prompt, suffix) in enumerate(zip(prompts, suffixes, strict=True)):
        groups.setdefault((len(prompt), len(suffix)), []).append(row)
    yield from groups.values()
