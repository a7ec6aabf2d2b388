"""Validation against sums over plain logits: every t counts by its masked tokens, and nothing of training is in it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import open_gates
from tests.tiny import LENGTH, packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.config.schema import Config  # noqa: E402
from w1train.data.batch import PackedBatch  # noqa: E402
from w1train.diffusion.corruption import corrupt_at  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402
from w1train.training.validation import scores, validate  # noqa: E402

TIMESTEPS = [0.125, 0.5, 0.875]
FIRST, OTHER = range(6), range(6, 10)
BYTES = {"": 2.0, "other": 3.0}
"""What stands for the bits per byte of each set: a multiple of the ELBO."""
# None of this may change a validation.
TRAINING_ONLY = {"mask_embedding_noise": 0.5, "random_length_probability": 1.0, "t_min": 0.4, "weight": "constant"}


def _config(diffusion: dict, *, seed: int = 1234) -> Config:
    config = tiny_config(diffusion=diffusion, training={"seed": seed}, validation={"timesteps": TIMESTEPS})
    config.diffusion.num_strata = 8
    return config


def _batches(samples: range) -> list[PackedBatch]:
    """Micro-batches of two samples, whose parts that may be noised differ."""
    batches = [packed_batch(range(first, first + 2)) for first in samples[::2]]
    for number, batch in enumerate(batches):
        batch.may_be_noised[:, : 5 * number] = False
    return batches


def _data(model, modes: list[bool]) -> SimpleNamespace:
    def served(name: str, samples: range):
        for batch in _batches(samples):
            modes.extend(chunk.training for chunk in model.chunks)
            yield batch

    def validation_set(name: str, samples: range) -> SimpleNamespace:
        return SimpleNamespace(batches=lambda: served(name, samples), bits_per_byte=lambda elbo: BYTES[name] * elbo)

    sets = {"": validation_set("", FIRST), "other": validation_set("other", OTHER)}
    return SimpleNamespace(validation=sets[""], validation_sets=sets)


@torch.no_grad()
def _expected(model, config: Config, samples: range, timesteps: list[float]) -> dict[str, object]:
    """By its definition: sums over all tokens of all micro-batches at each t, from plain logits. The noise is that of seed 0."""
    by_t = []
    for draw, t in enumerate(timesteps, start=1):
        total = num_masked = num_tokens = 0.0
        for batch in _batches(samples):
            noisy = corrupt_at(batch, config.diffusion, 0, t, draw=draw)
            logits = model.stages[0](rank_inputs(noisy, config).model)
            targets = noisy.targets[noisy.loss_mask]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            num_masked, num_tokens = num_masked + len(targets), num_tokens + int(noisy.has_target.sum())
        by_t.append((t, total, num_masked, num_tokens))
    return {
        "elbo": sum(total / t / num_tokens for t, total, _, num_tokens in by_t) / len(by_t),
        "masked_cross_entropy": sum(total for _, total, *_ in by_t) / sum(num_masked for *_, num_masked, _ in by_t),
        "loss_by_t": [total / num_masked for _, total, num_masked, _ in by_t],
    }


def _without_times(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.startswith("time/")}


def _score(_rank: int, _size: int, configs: list[Config], block_sizes: list[int]):
    """(record of each configuration, expected of the first set and the other, expected at each block size, modes of the model)"""
    with distributed(configs[0].parallel):
        model = build_trained_model(configs[0])
        open_gates(model)
        modes: list[bool] = []
        records = []
        for config in configs:
            config.validation.block_sizes = block_sizes
            records.append(_without_times(validate(config, model, _data(model, modes))))
        after = [chunk.training for chunk in model.chunks]
        plain = _config({name: getattr(configs[0].diffusion, name) for name in ("objective", "block_size", "clean_attention", "shift")})
        times = TIMESTEPS if plain.diffusion.objective == "diffusion" else [1.0]
        sets = [_expected(model, plain, samples, times) for samples in (FIRST, OTHER)]
        sizes = {}
        for size in block_sizes:
            plain.diffusion.block_size = size
            sizes[size] = _expected(model, plain, FIRST, TIMESTEPS if size > 1 else [1.0])["elbo"]
        return records, sets, sizes, (modes, after)


@pytest.mark.parametrize(
    ("diffusion", "block_sizes"),
    [({}, []), ({"block_size": 4, "clean_attention": "token_causal", "shift": True}, [1, 8, LENGTH])],
    ids=["one stream", "blocks"],
)
def test_is_its_definition(diffusion, block_sizes):
    """With another seed and other settings of training, too."""
    joint = {"autoregressive_weight": 0.5, "timestep_per": "block"} if block_sizes else {"complementary": True}
    others = {**diffusion, **TRAINING_ONLY, **joint}
    records, sets, sizes, modes = run_distributed(
        _score, 1, [_config(diffusion), _config(others, seed=7)], block_sizes, process_group=False
    )[0]
    record = records[0]
    for name, expected in zip(("", "/other"), sets, strict=True):
        for metric in ("elbo", "masked_cross_entropy"):
            assert record[metric + name] == pytest.approx(expected[metric], rel=1e-5)
        assert record["elbo_bits_per_byte" + name] == pytest.approx(BYTES[name[1:]] * expected["elbo"], rel=1e-5)
    assert record["loss_by_t"] == pytest.approx(sets[0]["loss_by_t"], rel=1e-5)
    for size, elbo in sizes.items():
        assert record[f"elbo_at_block_size/{size}"] == pytest.approx(elbo, rel=1e-5)
        assert record[f"elbo_bits_per_byte_at_block_size/{size}"] == pytest.approx(BYTES[""] * elbo, rel=1e-5)
    assert records[1] == {name: pytest.approx(value, rel=1e-6) for name, value in record.items()}
    assert modes == ([False] * len(modes[0]), [True])
    assert len(set(record["loss_by_t"])) == len(TIMESTEPS), "another mean over t would be another number"


def test_an_autoregressive_stage_is_scored_in_one_pass():
    """At t = 1, which stands for every t. Block sizes are those of diffusion."""
    records, sets, *_ = run_distributed(_score, 1, [_config({"objective": "autoregressive"})], [4], process_group=False)[0]
    elbo = pytest.approx(sets[0]["elbo"], rel=1e-5)
    assert (records[0]["elbo"], records[0]["masked_cross_entropy"]) == (elbo, elbo)
    assert records[0]["loss_by_t"] == [elbo] * len(TIMESTEPS)
    assert not any(name.startswith("elbo_at_block_size") for name in records[0])


def test_checkpoints_are_ranked_by_numbers_and_not_by_times():
    record = {"elbo": 2.0, "elbo_bits_per_byte": None, "loss_by_t": [1.0], "time/seconds": 3.0, "elbo/other": 4.0}
    assert scores(record) == {"elbo": 2.0, "elbo/other": 4.0}
