"""Runs on blends: what they record, that a kill changes nothing, and what is refused before the start."""

from __future__ import annotations

import math
import multiprocessing
import shutil
from functools import partial

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, TinyRun
from tests.end_to_end.test_resume import require_equal
from w1train.data.dataset import TokenDataset
from w1train.data.packed import packing_index

SETTINGS = [
    "data.train=null",
    "data.packing=best_fit",
    "data.align=4",
    "data.at_max_epochs=drop",
    "data.workers=process",
    "data.num_workers=2",
]


@pytest.fixture(scope="module")
def blend_data(tiny_data, tmp_path_factory):
    """The tiny corpus twice: as it is, and its validation part as a second corpus and a third that is set apart."""
    directory = tmp_path_factory.mktemp("blend")
    shutil.copytree(tiny_data, directory, dirs_exist_ok=True)
    return directory


def blend(*others):
    """Training is 2/3 one corpus and 1/3 the other; then the other alone is left out after a twentieth of its text."""
    return [
        *SETTINGS,
        "data.blend={big: {prefix: train, weight: 2}, small: {prefix: validation, weight: 1, max_epochs: 0.05}}",
        "data.validation=null",
        "checkpoint.keep_best=0",
        *others,
    ]


def with_workers(rank: int, trap=None) -> None:
    """Ranks of the tests are daemons, which may have no children."""
    multiprocessing.current_process()._config["daemon"] = False
    if trap is not None:
        trap(rank)


@pytest.mark.slow
def test_a_killed_run_on_a_blend_goes_on_bit_for_bit(blend_data, tmp_path):
    straight = TinyRun(blend_data, tmp_path / "straight")
    straight.train(*blend(), world_size=2, sabotage=with_workers).require(0)
    killed = TinyRun(blend_data, tmp_path / "killed")
    assert killed.train(*blend(), world_size=2, sabotage=partial(with_workers, trap=traps.after_commit(1))).killed
    # Other workers: the same samples.
    killed.train(*blend("data.workers=thread", "data.prefetch=1"), world_size=2).require(0)
    require_equal(killed, straight)
    assert len(list(blend_data.glob("*.best_fit_32_align4.pack"))) == 2

    records = straight.train_records()
    for record in records:
        tokens = {name: record[f"corpus_tokens/{name}"] for name in ("big", "small")}
        assert sum(tokens.values()) == record["tokens"]
    first = records[0]
    assert abs(first["corpus_tokens/small"] / LENGTH - BATCH / 3) <= 1
    limit = records[-1]["corpus_epochs/small"]
    assert 0.04 < limit <= 0.05
    assert records[-1]["corpus_tokens/big"] > 2.2 * records[-1]["corpus_tokens/small"], "dropped, and its place taken"


def on_a_machine_of_its_own(rank: int) -> None:
    """data.cache_directory is another directory on each rank."""
    with_workers(rank)
    path_of = packing_index.packing_path

    def local_path(dataset, options, directory=None):
        return path_of(dataset, options, f"{directory}/{rank}")

    packing_index.packing_path = local_path


def test_each_machine_has_packings_of_its_own(blend_data, tmp_path):
    run = TinyRun(blend_data, tmp_path / "runs")
    settings = blend("data.cache_directory=cache", "schedule.stages.stable.tokens=256")
    run.train(*settings, world_size=2, sabotage=on_a_machine_of_its_own).require(0)
    for rank in range(2):
        assert len(list((blend_data / "cache" / str(rank)).glob("*.pack"))) == 2


def test_what_is_refused_before_the_start(blend_data, tmp_path):
    run = TinyRun(blend_data, tmp_path / "runs")
    outcome = run.train("data.validation=train").require(2)
    assert "train: the same tokens as data.train, by their hash" in outcome.output
    outcome = run.train(*blend("data.at_max_epochs=error")).require(2)
    assert "validation: " in outcome.output
    assert "max_epochs allows" in outcome.output


def test_eos_is_left_out_of_validation_too(blend_data, tmp_path):
    """And out of the bits per byte of both: those of the documents' text."""
    run = TinyRun(blend_data, tmp_path / "runs")
    validation, train = (TokenDataset.open(blend_data / name) for name in ("validation", "train"))
    # The first records tell it all.
    short = ("schedule.stages.stable.tokens=256", "validation={interval: 100, timesteps: [0.5]}", "training.micro_batch_size=8")
    run.train("data.eos=drop", f"validation.num_samples={validation.num_tokens}", *short).require(0)
    for record, dataset in ((run.metrics()[0], validation), (run.train_records()[0], train)):
        num_tokens = dataset.num_tokens - dataset.num_documents
        bits_per_token = record["elbo"] / math.log(2)
        assert record["elbo_bits_per_byte"] == pytest.approx(bits_per_token * num_tokens / dataset.manifest.num_bytes)


def test_validation_sets_have_their_own_metrics(blend_data, tmp_path):
    run = TinyRun(blend_data, tmp_path / "runs")
    for suffix in ("bin", "idx", "json"):
        shutil.copy(blend_data / f"validation.{suffix}", blend_data / f"again.{suffix}")
    run.train("data.validation_sets={again: again}", "schedule.stages.stable.tokens=256").require(0)
    records = [record for record in run.metrics() if record["kind"] == "validation"]
    for record in records:
        for name in ("elbo", "elbo_bits_per_byte", "masked_cross_entropy"):
            assert record[f"{name}/again"] == record[name], "the same text under another name"


def test_stages_may_change_the_weights(blend_data, tmp_path):
    run = TinyRun(blend_data, tmp_path / "runs")
    stage = f"schedule.stages.last={{tokens: {2 * BATCH * LENGTH}, learning_rate: 0.01, blend: {{small: 1}}}}"
    run.train(*blend("data.packing=cut", "data.align=1", "data.workers=thread", stage, "data.blend.small.max_epochs=null")).require(0)
    records = run.train_records()
    before, after = records[-3], records[-1]
    assert after["corpus_tokens/big"] == before["corpus_tokens/big"]
    assert after["corpus_tokens/small"] - before["corpus_tokens/small"] == 2 * BATCH * LENGTH
