"""Corruption against a reference that goes over one sample token by token, with Python's numbers: every random word in its place."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.tiny import LENGTH, VOCAB_SIZE, packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import NoisyBatch, corrupt, corrupt_at
from w1train.diffusion.masked import MaskedProcess
from w1train.diffusion.philox import Purpose, random_words
from w1train.diffusion.timesteps import word_thresholds

SEED, NUM_SAMPLES = 2**40 + 3, 12
TWO_32, GOLDEN = 2**32, 0x9E3779B9
MASK = DiffusionConfig().mask_token_id
CONFIGS = {
    "sequence": {},
    "document": {"timestep_per": "document", "t_min": 0.2, "t_max": 0.9},
    "blocks of documents": {"block_size": 5, "timestep_per": "block"},
    "blocks of samples": {"block_size": 5, "timestep_per": "block", "block_index": "sample"},
    "shifted blocks": {"block_size": 4, "timestep_per": "block", "block_index": "sample", "shift": True},
    "pairs": {"complementary": True, "t_min": 0.3},
    "shifted pairs": {"complementary": True, "shift": True, "timestep_per": "document", "t_min": 0.1, "t_max": 0.95},
    "autoregressive": {"objective": "autoregressive"},
    "joint": {"block_size": 4, "clean_attention": "token_causal", "autoregressive_weight": 0.5},
}
each_config = pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS)


@dataclass
class Token:
    """What the reference says of one token of a sample."""

    seen: int
    document: int
    is_predicted: bool
    is_predictable: bool
    is_next: bool
    """Whether the clean stream predicts the token."""
    loss_t: float
    model_t: float
    segment: int


def _word(index: int, purpose: Purpose, place: int = 0, draw: int = 0) -> int:
    return int(random_words(SEED, torch.tensor([index]), draw=draw, purpose=purpose, num=place + 1)[0, place])


def _kept(index: int, config: DiffusionConfig) -> int:
    """How many tokens of the sample are left."""
    if _word(index, Purpose.LENGTH) >= int(config.random_length_probability * TWO_32):
        return LENGTH
    return 1 + _word(index, Purpose.LENGTH, 1) * LENGTH // TWO_32


def _segments(documents: list[int], config: DiffusionConfig) -> list[int]:
    if config.timestep_per != "block":
        return [max(document, 0) if config.timestep_per == "document" else 0 for document in documents]
    segments, first, ordinal = [], 0, -1
    for place, document in enumerate(documents):
        is_first = place == 0 or document != documents[place - 1]
        first = place if is_first else first
        origin = first if config.block_index == "document" else 0
        ordinal += is_first or (place - origin) % config.block_size == 0
        segments.append(ordinal)
    return segments


def _t(index: int, segment: int, config: DiffusionConfig) -> float:
    strata = config.num_strata
    num_bits = strata.bit_length() - 1
    reversed_place = int(f"{index % strata:0{num_bits}b}"[::-1], 2)
    stratum = (reversed_place + _word(index // strata, Purpose.STRATUM)) % strata
    fraction = ((stratum * TWO_32 + _word(index, Purpose.TIMESTEP)) // strata + segment * GOLDEN) % TWO_32
    t_max = min(config.t_max, 1 - config.t_min) if config.complementary else config.t_max
    return config.t_min + (t_max - config.t_min) * (fraction / TWO_32)


def _reference(batch: PackedBatch, row: int, config: DiffusionConfig, timestep: float | None, draw: int) -> list[Token]:
    index = int(batch.sample_indices[row])
    key = index // 2 if config.complementary and timestep is None else index
    kept = _kept(key, config) if timestep is None else LENGTH
    documents = [document if place < kept else -1 for place, document in enumerate(batch.document_ids[row].tolist())]
    segments = _segments(documents, config) if timestep is None and config.objective == "diffusion" else [0] * LENGTH
    tokens, may_be_noised = batch.tokens[row].tolist(), batch.may_be_noised[row].tolist()
    return [_token(place, kept, tokens, may_be_noised, documents, segments, key, index, config, timestep, draw) for place in range(LENGTH)]


def _token(place, kept, tokens, may_be_noised, documents, segments, key, index, config, timestep, draw) -> Token:
    follows = place > 0 and documents[place] == documents[place - 1]
    may = may_be_noised[place] and place < kept
    is_next = may and follows and tokens[place] != MASK
    if config.objective == "autoregressive":
        return Token(tokens[place], documents[place], is_next, is_next, False, 1.0, 0.0, 0)
    t = _t(key, segments[place], config) if timestep is None else timestep
    is_noised = _word(key, Purpose.NOISE, place, draw) < int(t * TWO_32)
    if config.complementary and timestep is None and index % 2 == 1:
        is_noised, t = not is_noised, 1 - t
    is_predictable = may and (follows or not config.shift)
    is_noised = is_noised and is_predictable and tokens[place] != MASK
    return Token(MASK if is_noised else tokens[place], documents[place], is_noised, is_predictable, is_next, t, t, segments[place])


def _batch() -> PackedBatch:
    """Documents with padding at their ends, some tokens that may not be noised, and the mask token as text; indices above 32 bits too."""
    batch = packed_batch(range(NUM_SAMPLES))
    generator = torch.Generator().manual_seed(3)
    batch.may_be_noised &= torch.rand(batch.tokens.shape, generator=generator) < 0.8
    batch.tokens[torch.rand(batch.tokens.shape, generator=generator) < 0.1] = MASK
    batch.sample_indices[NUM_SAMPLES // 2 :] += 2**33
    return batch


@each_config
@pytest.mark.parametrize("timestep", [None, 0.4])
def test_every_token_is_the_references(given, timestep):
    config = DiffusionConfig(num_strata=8, random_length_probability=0.4, **given)
    batch = _batch()
    noisy = corrupt(batch, config, SEED) if timestep is None else corrupt_at(batch, config, SEED, timestep, draw=2)
    for row in range(NUM_SAMPLES):
        expected = _reference(batch, row, config, timestep, 0 if timestep is None else 2)
        _compare_tokens(noisy, row, expected, batch.positions[row])
        _compare_outputs(noisy, row, expected, batch.tokens[row], moved=config.shift or config.objective == "autoregressive")
        if config.autoregressive_weight > 0:
            following = [token.is_next for token in expected[1:]] + [False]
            assert noisy.next_mask[row].tolist() == following
            assert torch.equal(noisy.next_targets[row, :-1][following[:-1]], batch.tokens[row, 1:][following[:-1]])


def _compare_tokens(noisy: NoisyBatch, row: int, expected: list[Token], positions: torch.Tensor) -> None:
    """What belongs to a token: what the model sees of it, and what t the model is told."""
    documents = torch.tensor([token.document for token in expected])
    assert noisy.input_ids[row].tolist() == [token.seen for token in expected]
    assert torch.equal(noisy.document_ids[row], documents.int())
    assert torch.equal(noisy.positions[row], torch.where(documents < 0, 0, positions))
    told = torch.tensor([token.model_t for token in expected], dtype=torch.float64).float()
    assert torch.equal(noisy.segment_timesteps[noisy.segment_index[row]], told)


def _compare_outputs(noisy: NoisyBatch, row: int, expected: list[Token], tokens: torch.Tensor, *, moved: bool) -> None:
    """What belongs to the output that predicts a token: the token's own, or the one before it."""
    outputs = slice(0, -1) if moved else slice(None)
    predicted = expected[1:] if moved else expected
    assert not moved or not noisy.has_target[row, -1]
    has_target = torch.tensor([token.is_predictable for token in predicted])
    assert torch.equal(noisy.has_target[row, outputs], has_target)
    assert noisy.loss_mask[row, outputs].tolist() == [token.is_predicted for token in predicted]
    assert torch.equal(noisy.targets[row, outputs], tokens[1:] if moved else tokens)
    times = torch.tensor([token.loss_t for token in predicted], dtype=torch.float64).float()
    assert torch.equal(noisy.target_timesteps[row, outputs][has_target], times[has_target])
    segments = torch.tensor([token.segment for token in predicted])
    assert torch.equal(noisy.target_segments[row, outputs][has_target], segments[has_target])


@pytest.mark.parametrize("t_min", [0.05, 0.3])
def test_neither_partner_is_below_t_min(t_min):
    """The weight 1/t of a partner at t near 0 has no bound."""
    config = DiffusionConfig(complementary=True, t_min=t_min, num_strata=8, random_length_probability=0.0)
    t = corrupt(packed_batch(range(2000)), config, SEED).segment_timesteps
    assert t.min() >= t_min - 1e-6
    assert t.max() <= 1 - t_min + 1e-6
    assert t.max() - t.min() > (1 - 2 * t_min) * 0.99


def test_a_threshold_is_never_above_its_probability():
    assert word_thresholds(torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)).tolist() == [TWO_32 // 3, 2 * TWO_32 // 3]
    words, t = torch.tensor([[TWO_32 // 4 - 1, TWO_32 // 4]]), torch.tensor([[0.25]], dtype=torch.float64)
    assert MaskedProcess(MASK).noised_tokens(words, t, words).tolist() == [[True, False]]


def test_no_two_uses_share_their_numbers():
    """A run that resumes draws what it would have drawn: a use keeps its number for ever."""
    names = ("NOISE", "TIMESTEP", "STRATUM", "LENGTH", "WEIGHT", "LIKELIHOOD", "EMBEDDING", "ATTENTION")
    assert [Purpose[name].value for name in names] == list(range(len(names)))


def test_the_reference_meets_every_case():
    """Otherwise the comparison above would compare less than it says."""
    batch = _batch()
    assert (batch.tokens == MASK).any()
    assert VOCAB_SIZE > MASK
    assert (batch.document_ids < 0).any()
    config = DiffusionConfig(num_strata=8, random_length_probability=0.4)
    lengths = [_kept(int(index), config) for index in batch.sample_indices]
    assert min(lengths) < LENGTH == max(lengths)
