"""Sampling of texts as completions of texts, with a tokenizer. Training and w1train.sample use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.data.conversations.chat_prompts import ChatPrompts
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
    """The text before the completion: the prompt, or with a chat template the text that the template made of it."""
    text: str
    """The completion before the first EOS, or before the token that ends a reply, without the prompt."""
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
    chat: ChatPrompts | None = None,
    suffixes: Sequence[str] | None = None,
    on_step: OnStep | None = None,
) -> list[TextSample]:
    """Complete each prompt as ``config.sampling`` says. The prompts and the chat template of ``config.sampling`` are not read.

    Args:
        model, device, on_step: as in w1train.sampling.denoise.generate.
        chat: the encoder of prompts that are messages, of the same tokenizer; None = the model continues the prompts.
        suffixes: a text for each prompt, before which the completion is filled in; None = no suffixes.

    Raises:
        UserError: settings cannot work, a prompt with its suffix is too long for a completion within model.max_sequence_length, or a prompt
            or suffix has an id that is outside model.vocab_size; or the chat template does not take a prompt.
    """
    prompt_tokens, shown = _encode_prompts(tokenizer, prompts, chat)
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
        other_end_ids=() if chat is None else chat.end_token_ids,
        on_step=on_step,
    )
    completions = [generation.completion(row) for row in range(len(prompts))]
    ends = [""] * len(prompts) if suffixes is None else suffixes
    return [
        TextSample(prompt, tokenizer.decode(tokens), tokens, num_passes, suffix)
        for prompt, tokens, num_passes, suffix in zip(shown, completions, generation.num_forward_passes, ends, strict=True)
    ]


def revise_texts(
    model: Predict | BlockPredict,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    texts: Sequence[str],
    config: Config,
    *,
    device: torch.device | str,
    chat: ChatPrompts | None = None,
    on_step: OnStep | None = None,
) -> list[TextSample]:
    """Revise the text after each prompt by ``config.sampling.reviser``, or by conditional modes if it is null.

    Args:
        model, device, on_step: as in w1train.sampling.denoise.revise.
        prompts: the text before each text, which does not change.
        chat: as in :func:`sample_texts`. The texts are then replies.

    Raises:
        UserError: settings cannot work, or a prompt with its text is too long or has an id that is outside model.vocab_size.
    """
    prompt_tokens, shown = _encode_prompts(tokenizer, prompts, chat)
    text_tokens = [tokenizer.encode(text) for text in texts]
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
        for prompt, tokens, num_passes in zip(shown, revised.texts, revised.num_forward_passes, strict=True)
    ]


def _encode_prompts(tokenizer: TextTokenizer, prompts: Sequence[str], chat: ChatPrompts | None) -> tuple[list[list[int]], Sequence[str]]:
    """Return the tokens of each prompt, and their text."""
    if chat is None:
        return [tokenizer.encode(prompt) for prompt in prompts], prompts
    tokens = chat.encode(prompts)
    return tokens, [tokenizer.decode(each) for each in tokens]


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
