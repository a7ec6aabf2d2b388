"""The exact-count estimator against enumerations, closed forms and a single forward pass."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from w1train.config.errors import UserError
from w1train.evaluation.likelihood import Pair, completion_masks, log_likelihoods

VOCAB_SIZE, MASK = 11, 10


class TinyModel(torch.nn.Module):
    """Random, and dependent on every token, every position and t: nothing cancels by chance."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCAB_SIZE, 16, generator=generator)
        self.position = torch.randn(64, 16, generator=generator)
        self.mixing = torch.randn(16, 16, generator=generator) / 4
        self.head = torch.randn(16, VOCAB_SIZE, generator=generator)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        self.calls.append((tokens.clone(), timesteps.clone()))
        hidden = self.embedding[tokens] + self.position[: tokens.shape[1]]
        hidden = torch.tanh(hidden + (hidden.mean(dim=1, keepdim=True) + timesteps[:, None, None]) @ self.mixing)
        logits = hidden @ self.head
        logits[:, :, MASK] = -torch.inf
        return logits


def context_free(tokens: Tensor, _timesteps: Tensor) -> Tensor:
    """The same distribution everywhere."""
    return torch.linspace(-1, 1, VOCAB_SIZE).expand(*tokens.shape, -1)


def score(predict, *pairs: Pair, **options) -> list[float]:
    return log_likelihoods(predict, pairs, mask_token_id=MASK, vocab_size=VOCAB_SIZE, **options)


def enumerated(predict, pair: Pair) -> float:
    """Eq. 6 term by term: every l, every choice of l tokens, one forward pass each."""
    length, start = len(pair.completion), len(pair.prompt)
    total = 0.0
    for count in range(1, length + 1):
        choices = list(itertools.combinations(range(length), count))
        for choice in choices:
            noisy = torch.tensor([pair.tokens])
            noisy[0, [start + place for place in choice]] = MASK
            t = torch.tensor([count / len(pair.tokens)])
            log_probabilities = predict(noisy, t).double().log_softmax(dim=-1)[0]
            found = sum(log_probabilities[start + place, pair.completion[place]].item() for place in choice)
            total += length / count * found / (length * len(choices))
    return total


@pytest.mark.parametrize("length", range(1, 8))
@pytest.mark.parametrize("prompt", [(), (3, 1, 4)])
def test_short_completions_are_exact(length, prompt):
    pair = Pair(prompt, tuple((3 * place + 1) % 10 for place in range(length)))
    model = TinyModel()
    (found,) = score(model, pair)
    assert found == pytest.approx(enumerated(TinyModel(), pair), rel=1e-6)
    assert sum(len(tokens) for tokens, _ in model.calls) == 2**length - 1


def test_one_token_is_one_forward_pass():
    model, pair = TinyModel(), Pair((1, 2), (3,))
    (found,) = score(model, pair)
    log_probabilities = TinyModel()(torch.tensor([[1, 2, MASK]]), torch.tensor([1 / 3])).log_softmax(dim=-1)
    assert found == pytest.approx(log_probabilities[0, 2, 3].item(), rel=1e-6)
    assert len(model.calls) == 1


def plain_errors(predict, completion: tuple[int, ...], exact: float) -> torch.Tensor:
    """Of eq. 6 as it is printed: 128 independent l and masks."""
    length, num_draws = len(completion), 128
    generator, errors = torch.Generator().manual_seed(1), []
    tokens = torch.tensor([(0, 0, *completion)]).expand(num_draws, -1)
    for _ in range(50):
        counts = torch.randint(1, length + 1, (num_draws, 1), generator=generator)
        hidden = torch.rand(num_draws, length, generator=generator).argsort(dim=1).argsort(dim=1) < counts
        hidden = torch.nn.functional.pad(hidden, (2, 0))
        log_probabilities = predict(tokens.masked_fill(hidden, MASK), hidden.float().mean(dim=1)).double().log_softmax(dim=2)
        found = (log_probabilities.gather(2, tokens[:, :, None])[:, :, 0] * hidden).sum(dim=1)
        errors.append((found * length / counts[:, 0]).mean() - exact)
    return torch.stack(errors)


def test_the_estimate_is_unbiased_and_close():
    """With 9 tokens there are 511 masks. Prompts that the model cannot tell apart differ in their noise alone."""
    blind, completion = TinyModel(), (5, 3, 8, 1, 9, 2, 2, 7, 0)
    blind.embedding[:MASK] = blind.embedding[0]
    exact = enumerated(blind, Pair((0, 0), completion))
    pairs = [Pair((first, second), completion) for first in range(10) for second in range(10)]
    errors = torch.tensor(score(blind, *pairs)).double() - exact
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(len(errors))
    assert 0 < errors.std() < 0.02 * abs(exact)
    assert errors.std() < 0.6 * plain_errors(blind, completion, exact).std()
    few = torch.tensor(score(blind, *pairs, num_draws=9)).double() - exact
    assert abs(few.mean()) < 4 * few.std() / math.sqrt(len(few))
    assert few.std() > 2 * errors.std()


@pytest.mark.parametrize("length", [1, 3, 7, 8, 20, 200])
def test_a_context_free_model_has_its_exact_likelihood_in_expectation(length):
    """Each token then counts the expectation of L / l over the masks that hide it, which is one."""
    completion = tuple((7 * place) % 10 for place in range(length))
    log_probabilities = torch.linspace(-1, 1, VOCAB_SIZE).double().log_softmax(dim=0)
    exact = sum(log_probabilities[token].item() for token in completion)
    (found,) = score(context_free, Pair((), completion), num_draws=128)
    assert found == pytest.approx(exact, rel=1e-6 if length < 8 else 0.02)
    uniform = torch.full((1, 1, VOCAB_SIZE), 0.5)
    (found,) = score(lambda tokens, _t: uniform.expand(*tokens.shape, -1), Pair((), completion))
    # L / l times l equal terms: no variance at all.
    assert found == pytest.approx(-length * math.log(VOCAB_SIZE), rel=1e-6)


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 9))
def test_masks(length, num_draws, token):
    pair = Pair((token,), (token,) * length)
    masks, weights = completion_masks(pair, num_draws)
    counts = masks.sum(dim=1)
    assert masks.shape[1] == length
    assert counts.min() >= 1
    if 2**length - 1 <= num_draws:
        assert len(masks.unique(dim=0)) == len(masks) == 2**length - 1
    else:
        assert len(masks) == num_draws
        # Evenly over 1..L: each count as often as any other, give or take one.
        times = torch.bincount(counts, minlength=length + 1)[1:]
        assert times.max() - times.min() <= 1
        assert torch.allclose(weights, length / (num_draws * counts.double()))
        half = masks[counts == length // 2]
        assert not (half[0::2][: len(half) // 2] & half[1::2]).any(), "neighbours of the same count have no token in common"


def test_every_token_is_masked_as_often_as_any_other():
    """Over many completions; chi-squared on the tokens hidden at l = 3 of 10 (less than chance, for neighbours share none)."""
    hidden, num_masks = torch.zeros(10), 0
    for first in range(10):
        for second in range(10):
            masks, _ = completion_masks(Pair((first, second), (1,) * 10), 100)
            chosen = masks[masks.sum(dim=1) == 3]
            hidden += chosen.sum(dim=0)
            num_masks += len(chosen)
    expected = 0.3 * num_masks
    chi_squared = ((hidden - expected) ** 2 / (expected * 0.7)).sum() * 0.9
    assert num_masks == 1000
    assert chi_squared < 20  # 9 degrees of freedom: 98 % of independent choices are below


def test_prompts_stay_clean_and_t_is_the_share_of_masks_in_the_sequence():
    model = TinyModel()
    prompt, completion = (1, 2, 3), (4, 5, 6, 7, 8, 9, 0, 1)
    score(model, Pair(prompt, completion), batch_size=7)
    assert [len(tokens) for tokens, _ in model.calls] == [7] * 18 + [2]
    for tokens, timesteps in model.calls:
        assert all(tuple(row[:3]) == prompt for row in tokens.tolist())
        assert all(token in (MASK, clean) for row in tokens[:, 3:].tolist() for token, clean in zip(row, completion, strict=True))
        assert timesteps.dtype == torch.float32
        torch.testing.assert_close(timesteps, (tokens == MASK).float().mean(dim=1))


def test_scores_do_not_depend_on_batches_order_or_company():
    pairs = [Pair((1, 2), tuple(range(9))), Pair((), (3,)), Pair((4, 4, 4), (1, 2, 3, 4, 5, 6, 7, 8)), Pair((0,), (9, 9))]
    together = score(TinyModel(), *pairs)
    assert score(TinyModel(), *pairs, batch_size=3) == pytest.approx(together, rel=1e-6)
    assert score(TinyModel(), *reversed(pairs)) == pytest.approx(together[::-1], rel=1e-6)
    assert [score(TinyModel(), pair)[0] for pair in pairs] == pytest.approx(together, rel=1e-6)
    assert score(TinyModel(), *pairs) == together


def test_golden_masks():
    """The noise is fixed for good: two evaluations a year apart compare."""
    masks, _ = completion_masks(Pair((1, 2, 3), (4, 5, 6, 7, 8)), 4)
    assert masks.int().tolist() == GOLDEN


GOLDEN = [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        (Pair((1,), ()), {}, "completion 0 has no tokens"),
        (Pair((MASK,), (1,)), {}, "has the mask token"),
        (Pair((), (1, MASK)), {}, "has the mask token"),
        (Pair((), (1,)), {"num_draws": 0}, "number of draws is 0"),
    ],
)
def test_what_cannot_be_scored_is_said(pair, options, message):
    with pytest.raises(UserError, match=message):
        score(context_free, pair, **options)
