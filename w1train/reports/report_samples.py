"""The texts that a run wrote while it learned, for its report."""

from __future__ import annotations

import html
from collections.abc import Sequence

from w1train.records.sample_text import MASK_SYMBOL, continuation, shorten, split_masks
from w1train.reports.report_page import section
from w1train.reports.run_content import Record, Run
from w1train.runtime.quantities import quantity

_MAX_STEPS, _MAX_CHARACTERS = 8, 1500
_NUM_BECOMING, _MAX_EARLY_CHARACTERS = 4, 600


def becoming(run: Run) -> str:
    """Return samples of one prompt, from the first step to the last, or "" for a run with samples of fewer than two steps."""
    samples = _of_one_prompt(run.samples)
    shown = [samples[step] for step in evenly(sorted(samples), _NUM_BECOMING)]
    if len(shown) < 2:
        return ""
    after = ", all of them after the prompt in bold" if shown[-1]["prompt"] else ""
    cards = "".join(_card(sample, _MAX_EARLY_CHARACTERS) for sample in shown)
    note = f'<p class="note">The model wrote these texts during training{after}.</p>'
    return section("From noise to text", f'{note}<div class="becoming">{cards}</div>')


def _of_one_prompt(samples: Sequence[Record]) -> dict[int, Record]:
    """Return the first sample of each step, by its step, for the prompt with the most steps."""
    by_prompt: dict[str, dict[int, Record]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["prompt"], {}).setdefault(sample["step"], sample)
    return max(by_prompt.values(), key=len, default={})


def samples(run: Run) -> str:
    """Return the samples of several steps, the newest first."""
    if not run.samples:
        return ""
    steps = sorted({sample["step"] for sample in run.samples})
    shown = set(evenly(steps, _MAX_STEPS))
    newest_first = sorted(run.samples, key=lambda sample: -sample["step"])
    cards = "".join(_card(sample, _MAX_CHARACTERS) for sample in newest_first if sample["step"] in shown)
    left_out = f" {len(shown)} of {len(steps)} steps are shown; samples.jsonl has all." if len(shown) < len(steps) else ""
    note = f'The newest are first.{left_out} Prompts are bold; <span class="second">{MASK_SYMBOL}</span> is a token that is still masked.'
    return section("Samples", f'<p class="note">{note}</p><div class="samples">{cards}</div>')


def _card(sample: Record, max_characters: int) -> str:
    pieces = [
        f'<span class="mask">{MASK_SYMBOL * num_masks}</span>' if num_masks else html.escape(piece)
        for piece, num_masks in split_masks(shorten(continuation(sample), max_characters))
    ]
    prompt = html.escape(shorten(sample["prompt"], max_characters))
    title = f"step {sample['step']:,}, {quantity(sample['tokens'])} tokens"
    return f'<article class="sample"><h3>{title}</h3><pre><span class="prompt">{prompt}</span>{"".join(pieces)}</pre></article>'


def evenly(items: Sequence[int], count: int) -> list[int]:
    """Return ``count`` items at most, evenly chosen, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]
