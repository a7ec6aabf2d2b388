"""Generation by iterative denoising (LLaDA, arXiv 2502.09992, algorithms 4 and 5).

A canvas starts as the prompt followed by mask tokens. Each step predicts every masked token of the current block and keeps
a few of the predictions, the most confident ones or a random choice; the others stay masked. Blocks are filled left to
right (semi-autoregressive); one block as long as the generation is pure diffusion.

The t given to the model is the share of mask tokens in the whole sequence, prompt and later blocks included. In training t
is the probability with which *every* token of a sequence is masked, so a sequence of l tokens, m of them masked, is most
likely under t = m / l; the model cannot tell a prompt from tokens that happened to stay clean. The share among generated
tokens alone would say t = 1 while half of the sequence is visible, a pair that training never shows.

Shapes: b = rows of one batch, p = prompt tokens, g = generated tokens, l = p + g, v = vocabulary, n = masked tokens of the
current block (equal for all rows of a batch: every row unmasks the same number at every step).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from w1train.config.errors import UserError
from w1train.config.schema import SamplingConfig
from w1train.config.validate import denoising_problems

logger = logging.getLogger(__name__)

Predict = Callable[[Tensor, Tensor], Tensor]
"""The model: (tokens int64 [b, l], t float32 [b]) -> logits [b, l, v]. Rows of one call have equal lengths and no padding."""

_REMASKING = get_args(get_type_hints(SamplingConfig)["remasking"])


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """The state after a step, for watching."""

    step: int
    """1-based."""
    num_steps: int
    """Steps that this batch takes."""
    rows: list[int]
    """Which prompts the batch holds (prompts of equal length go together)."""
    t: float
    """The t the model was given."""
    tokens: Tensor
    """int64 [b, l]; mask tokens where nothing is decided yet. A copy."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What came out, in the order of the prompts."""

    prompts: list[list[int]]
    completions: Tensor
    """int64 [number of prompts, g], on the CPU; what follows an EOS is kept here."""
    num_steps_run: int
    """Forward passes that each prompt took."""
    eos_token_id: int

    def completion(self, row: int) -> list[int]:
        """The generated tokens of a prompt up to the first EOS, which is left out."""
        return cut_at_eos(self.completions[row].tolist(), self.eos_token_id)


@dataclass(frozen=True, slots=True)
class _PlannedStep:
    start: int
    """First generated position of the block (0 = just after the prompt)."""
    end: int
    num_unmasked: int
    """Tokens that the step unmasks, all inside the block."""


@torch.no_grad()
def generate(
    predict: Predict,
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
        predict: the model; logits may or may not leave out the mask token, which is never generated.
        prompts: token ids in [0, v) without mask tokens; a prompt may be empty.
        config: num_tokens, num_steps, block_size, temperature, remasking and seed are used.
        device: where the model takes its tokens.
        vocab_size: ids from here on are never generated (a model's vocabulary is often rounded up beyond the tokenizer's);
            None = every id of the model but the mask may be.
        on_step: called after every step of every batch.

    Returns:
        The completions. At temperature 0 each is a function of the prompt alone (with low-confidence remasking).

    Raises:
        UserError: for a setting that cannot work (all of them in one message), no prompt, or a prompt with mask tokens.
    """
    plan = plan_steps(config)
    prompt_lists: list[list[int]] = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    _check_prompts(prompt_lists, mask_token_id)
    completions = torch.empty(len(prompt_lists), config.num_tokens, dtype=torch.int64)
    for rows in _rows_of_equal_length(prompt_lists):
        prompt = torch.tensor([prompt_lists[row] for row in rows], dtype=torch.int64).reshape(len(rows), -1)
        canvas = torch.nn.functional.pad(prompt, (0, config.num_tokens), value=mask_token_id).to(device)
        for step, t in enumerate(_denoise(predict, canvas, plan, config, rows, mask_token_id, vocab_size), start=1):
            if on_step is not None:
                on_step(DenoisingStep(step, len(plan), rows, t, canvas.clone()))
        completions[torch.tensor(rows)] = canvas[:, prompt.shape[1] :].cpu()
    return Generation(prompt_lists, completions, len(plan), eos_token_id)


def plan_steps(config: SamplingConfig) -> list[_PlannedStep]:
    """The steps in order: blocks left to right, ``transfer_counts`` inside a block.

    Raises:
        UserError: with everything that is wrong with the settings.
    """
    _check_config(config)
    block_size = config.block_size or config.num_tokens
    num_blocks = config.num_tokens // block_size
    counts = transfer_counts(block_size, config.num_steps // num_blocks)
    plan = [
        _PlannedStep(block * block_size, (block + 1) * block_size, count) for block in range(num_blocks) for count in counts if count > 0
    ]
    if len(plan) < config.num_steps:
        logger.info("%d of %d denoising steps have no token left to unmask and are skipped", config.num_steps - len(plan), config.num_steps)
    return plan


def transfer_counts(num_masked: int, num_steps: int) -> list[int]:
    """How many tokens each step unmasks: evenly, the remainder one by one to the first steps (LLaDA's generate)."""
    base, remainder = divmod(num_masked, num_steps)
    return [base + (step < remainder) for step in range(num_steps)]


def cut_at_eos(tokens: list[int], eos_token_id: int) -> list[int]:
    """The tokens before the first EOS, or all of them."""
    return tokens[: tokens.index(eos_token_id)] if eos_token_id in tokens else tokens


def _denoise(
    predict: Predict,
    canvas: Tensor,
    plan: list[_PlannedStep],
    config: SamplingConfig,
    rows: list[int],
    mask_token_id: int,
    vocab_size: int | None,
) -> Iterator[float]:
    """Fill the canvas [b, l] in place, step by step; yields the t of each step once it is done."""
    generators = [_row_generator(config.seed, row, canvas.device) for row in rows]
    prompt_length = canvas.shape[1] - config.num_tokens
    for planned in plan:
        is_mask = canvas == mask_token_id
        t = is_mask.sum(dim=1, dtype=torch.float32) / canvas.shape[1]
        logits = predict(canvas.clone(), t)
        assert logits.shape[:2] == canvas.shape, f"predict gave {tuple(logits.shape)} for tokens {tuple(canvas.shape)}"
        # Only masked positions of the block are candidates: the others have LLaDA's confidence of -inf.
        start, end = prompt_length + planned.start, prompt_length + planned.end
        masked = is_mask[:, start:end].nonzero()[:, 1].view(len(rows), -1) + start  # [b, n]
        # float64: float32 Gumbel noise visibly lowers the quality of samples (LLaDA's note), and float32 probabilities tie at 1.
        candidates = logits.gather(1, masked[:, :, None].expand(-1, -1, logits.shape[2])).double()  # [b, n, v]
        candidates[:, :, mask_token_id] = -torch.inf
        if vocab_size is not None:
            candidates[:, :, vocab_size:] = -torch.inf
        predictions = _choose_tokens(candidates, config.temperature, generators)
        priority = _keeping_order(candidates, predictions, config, generators)
        # A stable sort, because topk may break ties differently from one device or batch size to another.
        kept = priority.sort(dim=1, descending=True, stable=True).indices[:, : planned.num_unmasked]
        canvas.scatter_(1, masked.gather(1, kept), predictions.gather(1, kept))
        yield t[0].item()


def _keeping_order(logits: Tensor, predictions: Tensor, config: SamplingConfig, generators: list[torch.Generator]) -> Tensor:
    """float64 [b, n], highest first: random, or the log-probability of the prediction (at temperature 1)."""
    if config.remasking == "random":
        scores = [torch.rand(logits.shape[1], generator=generator, device=logits.device, dtype=torch.float64) for generator in generators]
        return torch.stack(scores)
    return logits.gather(2, predictions[:, :, None])[:, :, 0] - logits.logsumexp(dim=2)


def _choose_tokens(logits: Tensor, temperature: float, generators: list[torch.Generator]) -> Tensor:
    """Exact argmax at temperature 0, otherwise a sample of softmax(logits / temperature) by the Gumbel-max trick.

    Written as logits - temperature * log(E), E exponential: the same order as logits / temperature + Gumbel noise, but
    finite at any temperature.

    Args:
        logits: float64 [b, n, v].

    Returns:
        int64 [b, n].
    """
    if temperature == 0:
        return logits.argmax(dim=2)
    noise = torch.empty_like(logits)
    for row, generator in enumerate(generators):
        noise[row].exponential_(generator=generator)
    return noise.log_().mul_(-temperature).add_(logits).argmax(dim=2)


def _row_generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    """A generator for one row; hashed, because the CPU generator keeps 32 bits of its seed and seed + row would collide."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _rows_of_equal_length(prompts: list[list[int]]) -> Iterator[list[int]]:
    """Indices of the prompts, grouped by length in the order in which the lengths first occur."""
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(row)
    yield from groups.values()


def _check_prompts(prompts: list[list[int]], mask_token_id: int) -> None:
    if not prompts:
        raise UserError("no prompt given; an empty prompt ([]) generates from nothing")
    for row, prompt in enumerate(prompts):
        if mask_token_id in prompt:
            place = prompt.index(mask_token_id)
            raise UserError(f"prompt {row} has the mask token ({mask_token_id}) at position {place}; prompts must be clean tokens")


def _check_config(config: SamplingConfig) -> None:
    """Raise one UserError that lists every setting that cannot work, with the values that would."""
    problems = [
        f"sampling.{name} is {value}; it must be at least 1"
        for name, value in (("num_tokens", config.num_tokens), ("num_steps", config.num_steps), ("block_size", config.block_size))
        if value is not None and value < 1
    ]
    if not 0 <= config.temperature < float("inf"):
        problems.append(f"sampling.temperature is {config.temperature}; it must be 0 (greedy) or a positive number")
    if config.remasking not in _REMASKING:
        problems.append(f"sampling.remasking is {config.remasking!r}; valid: {', '.join(_REMASKING)}")
    if not problems:
        problems = [f"{problem.key} is {problem.found}; it must be {problem.valid}" for problem in denoising_problems(config)]
    if problems:
        raise UserError("; ".join(problems))
