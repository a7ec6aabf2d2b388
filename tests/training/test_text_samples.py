"""Samples of an autoregressive stage, which have to be what its model predicts token by token."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch

from tests.sampling.test_block_cache import in_one_process
from tests.tiny import VOCAB_SIZE, tiny_config
from w1train.config.schema import SamplingConfig
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.attention.attention_plan import plan_attention  # noqa: E402
from w1train.attention.visibility import causal_visibility  # noqa: E402
from w1train.training.text_samples import complete_prompts  # noqa: E402

PROMPTS = ["abc", "a longer prompt"]
NUM_TOKENS = 9


class ByteTokenizer:
    """Bytes behind 16 special tokens, as text of one character each."""

    vocab_size = VOCAB_SIZE
    eos_token_id = VOCAB_SIZE  # no text ends

    def encode(self, text):
        return [16 + ord(letter) % (VOCAB_SIZE - 16) for letter in text]

    def decode(self, ids):
        return " ".join(map(str, ids))


class BackwardChat:
    """An encoder of prompts that writes them backwards."""

    end_token_ids = ()

    def encode(self, prompts):
        return [ByteTokenizer().encode(prompt[::-1]) for prompt in prompts]


def _next_tokens(predictor, tokens):
    """Return the most probable continuation, from a causal pass over the whole text for each token."""
    for _ in range(NUM_TOKENS):
        canvas = torch.tensor([tokens])
        plan = plan_attention(causal_visibility(torch.zeros_like(canvas, dtype=torch.int32)))
        logits = predictor.forward(canvas, torch.zeros(1), plan, num_logits=1)[0, 0]
        logits[predictor.config.diffusion.mask_token_id] = -torch.inf
        tokens = [*tokens, int(logits.argmax())]
    return tokens[-NUM_TOKENS:]


def test_an_autoregressive_stage_writes_what_its_model_predicts():
    config = tiny_config(diffusion={"objective": "autoregressive"})
    config = dataclasses.replace(config, sampling=SamplingConfig(prompts=PROMPTS, num_tokens=NUM_TOKENS, block_size=4))
    tokenizer = ByteTokenizer()

    def body(predictor):
        model = SimpleNamespace(chunks=predictor.chunks)
        written = complete_prompts(config, model, tokenizer, torch.device("cpu"))
        chat = BackwardChat()
        replies = complete_prompts(config, model, tokenizer, torch.device("cpu"), chat)
        with predictor.evaluating():
            given = [tokenizer.encode(prompt) for prompt in PROMPTS] + chat.encode(PROMPTS)
            return written, replies, [(tokenizer.decode(tokens), _next_tokens(predictor, tokens)) for tokens in given]

    written, replies, all_expected = in_one_process(config, body)
    assert replies == [(prompt, tokenizer.decode(tokens)) for prompt, tokens in all_expected[2:]]
    expected = [tokens for _, tokens in all_expected[:2]]
    assert written == [(prompt, tokenizer.decode(tokens)) for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    assert len({token for tokens in expected for token in tokens}) > 3, "one token over and over would hide a mistake"
