"""Sampling of texts as completions of texts, with a tokenizer. Training and w1train.sample use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.sampling.denoise import OnStep, generate, revise
from w1train.sampling.model_passes import BlockPredict, Predict


class TextTokenizer(Protocol):
    """The part of w1train.data.tokenizer.Tokenizer that sampling uses."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class TextSample:
    """A prompt with its completion, and the suffix before which the completion was filled in."""

    prompt: str
    text: str
    """The completion before the first EOS, without the prompt."""
    tokens: list[int]
    """Token ids of ``text``. There are fewer than sampling.num_tokens if the model generated an EOS."""
    num_forward_passes: int
    """Passes of the model that the completion took."""
    suffix: str = ""
    """The given text after the completion."""

    def __str__(self) -> str:
        return self.prompt + self.text + self.suffix


def sample_texts(
    model: Predict | BlockPredict,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    config: Config,
    *,
    device: torch.device | str,
    suffixes: Sequence[str] | None = None,
    on_step: OnStep | None = None,
) -> list[TextSample]:
    """Complete each prompt as ``config.sampling`` says. The prompts of ``config.sampling`` are not read.

    Args:
        model, device, on_step: as in w1train.sampling.denoise.generate.
        suffixes: a text for each prompt, before which the completion is filled in; None = no suffixes.

    Raises:
        UserError: settings cannot work, a prompt with its suffix is too long for a completion within model.max_sequence_length, or a prompt
            or suffix has an id that is outside model.vocab_size.
    """
    prompt_tokens = [tokenizer.encode(prompt) for prompt in prompts]
    suffix_tokens = None if suffixes is None else [tokenizer.encode(suffix) for suffix in suffixes]
    _check_given_tokens(prompt_tokens, suffix_tokens or [[] for _ in prompts], "suffix", config.sampling.num_tokens, config)
    generation = generate(
        model,
        prompt_tokens,
        config.sampling,
        diffusion=config.diffusion,
        eos_token_id=tokenizer.eos_token_id,
        device=device,
        vocab_size=tokenizer.vocab_size,
        suffixes=suffix_tokens,
        on_step=on_step,
    )
    completions = [generation.completion(row) for row in range(len(prompts))]
    ends = [""] * len(prompts) if suffixes is None else suffixes
    return [
        TextSample(prompt, tokenizer.decode(tokens), tokens, num_passes, suffix)
        for prompt, tokens, num_passes, suffix in zip(prompts, completions, generation.num_forward_passes, ends, strict=True)
    ]


def revise_texts(
    model: Predict | BlockPredict,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    texts: Sequence[str],
    config: Config,
    *,
    device: torch.device | str,
    on_step: OnStep | None = None,
) -> list[TextSample]:
    """Revise the text after each prompt by ``config.sampling.reviser``, or by conditional modes if it is null.

    Args:
        model, device, on_step: as in w1train.sampling.denoise.revise.
        prompts: the text before each text, which does not change.

    Raises:
        UserError: settings cannot work, or a prompt with its text is too long or has an id that is outside model.vocab_size.
    """
    prompt_tokens, text_tokens = ([tokenizer.encode(text) for text in given] for given in (prompts, texts))
    _check_given_tokens(prompt_tokens, text_tokens, "text", 0, config)
    revised = revise(
        model,
        prompt_tokens,
        text_tokens,
        config.sampling,
        diffusion=config.diffusion,
        device=device,
        vocab_size=tokenizer.vocab_size,
        on_step=on_step,
    )
    return [
        TextSample(prompt, tokenizer.decode(tokens), tokens, num_passes)
        for prompt, tokens, num_passes in zip(prompts, revised.texts, revised.num_forward_passes, strict=True)
    ]


def _check_given_tokens(
    prompt_tokens: list[list[int]], other_tokens: list[list[int]], other_name: str, num_tokens: int, config: Config
) -> None:
    """Raise UserError if the model cannot have the prompts, the texts after them, and ``num_tokens`` generated tokens between."""
    limit, vocab_size = config.model.max_sequence_length, config.model.vocab_size
    for row, (prompt, other) in enumerate(zip(prompt_tokens, other_tokens, strict=False)):
        if (largest := max([*prompt, *other], default=0)) >= vocab_size:
            raise UserError(
                f"prompt {row} has the token id {largest}, and model.vocab_size is {vocab_size}: the tokenizer is not that of the model"
            )
        if len(prompt) + num_tokens + len(other) > limit:
            parts = [f"prompt {row} has {len(prompt)} tokens"]
            parts += [f"its {other_name} has {len(other)} tokens"] if other else []
            parts += [f"sampling.num_tokens is {num_tokens}"] if num_tokens else []
            raise UserError(
                f"{' and '.join(filter(None, [', '.join(parts[:-1]), parts[-1]]))}, which together is more than "
                f"model.max_sequence_length = {limit}; they may add up to {limit} at most"
            )
