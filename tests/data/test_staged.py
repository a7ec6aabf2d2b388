"""Samples of several corpora in one order: each is read on, partners come twice, and none is read more often than it may be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w1train.data.packed.staged import BlendError, StagedSamples, StageText, stretches


@dataclass
class Numbered:
    """A corpus whose samples are their own numbers."""

    name: str
    sequence_length: int = 4
    num_samples_per_epoch: int = 10

    def sample(self, index):
        return self.name, index


def staged(stages, num_samples, limits=None, **options):
    names = dict.fromkeys(name for stage in stages for name in stage.weights)
    return StagedSamples(stretches(stages, num_samples, limits, **options), {name: Numbered(name) for name in names})


def single(first, name, repeats=1):
    return StageText(first, {name: 1.0}, repeats)


def test_corpora_are_read_on():
    samples = staged([single(0, "a"), single(6, "b"), single(8, "a")], 11)
    assert [samples.sample(index) for index in range(11)] == [
        *(("a", index) for index in range(6)),
        *(("b", index) for index in range(2)),
        *(("a", index) for index in range(6, 9)),
    ]
    assert [samples.epoch(count) for count in (0, 6, 7, 8, 9)] == [0.0, 0.6, 0.1, 0.2, 0.7]
    assert samples.num_read(9) == {"a": 7, "b": 2}


def test_partners_share_a_text_and_the_next_stage_goes_on_behind_them():
    samples = staged([single(0, "a"), single(4, "a", repeats=2), single(10, "a")], 12)
    assert [samples.sample(index)[1] for index in range(12)] == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8]


def test_one_stage_is_its_corpus():
    samples = staged([single(0, "a")], 5)
    assert [samples.sample(index) for index in (0, 7, 1000)] == [("a", 0), ("a", 7), ("a", 1000)], "also beyond the end, for prefetching"


blends = st.lists(
    st.tuples(st.integers(1, 40), st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 1.0), min_size=1), st.integers(1, 2)),
    min_size=1,
    max_size=4,
)


@given(blends, st.dictionaries(st.sampled_from("abc"), st.integers(0, 30)))
def test_each_corpus_is_read_in_its_own_order_and_no_more_than_allowed(drawn, limits):
    """Over stages of any blends: corpus samples come as 0, 1, 2, ..., and what is counted is what was read. Corpus d has no limit."""
    stages, first = [], 0
    for length, weights, repeats in drawn:
        stages.append(StageText(first, {**weights, "d": 0.5}, repeats))
        first += length * repeats
    samples = staged(stages, first, limits, drop_exhausted=True)
    read: dict[str, list[int]] = {name: [] for name in "abcd"}
    for index in range(first):
        assert {name: len(numbers) for name, numbers in read.items() if name in samples.sources} == samples.num_read(index)
        name, number = samples.sample(index)
        repeats = samples.part(index).repeats
        if (index - samples.part(index).first) % repeats == 0:
            read[name].append(number)
        else:
            assert read[name][-1] == number, "a partner"
    for name, numbers in read.items():
        assert numbers == list(range(len(numbers)))
        assert len(numbers) <= limits.get(name, first)
    share_of_d = sum(length * 0.5 / sum(stage.weights.values()) for (length, _, _), stage in zip(drawn, stages, strict=True))
    assert len(read["d"]) > share_of_d - 1.7 * len(samples.parts), "its share, to within what Interleave promises of each part"


def test_each_corpus_gets_its_share():
    """To the sample, where the shares are whole numbers."""
    samples = staged([StageText(0, {"a": 1.0, "b": 1.0, "d": 0.5}), StageText(50, {"a": 0.5, "d": 0.5}, 2)], 90)
    assert samples.num_read(50) == {"a": 20, "b": 20, "d": 10}
    assert samples.num_read(90) == {"a": 30, "b": 20, "d": 20}


def test_a_corpus_read_too_often_is_an_error_before_the_start():
    stages = [StageText(0, {"a": 0.5, "b": 0.5})]
    assert len(stretches(stages, 20, {"a": 10})) == 1
    with pytest.raises(BlendError, match=r"a: 11 samples are asked for, max_epochs allows 10"):
        stretches(stages, 22, {"a": 10})
    with pytest.raises(BlendError, match="after 14 of the run's 22 samples every corpus"):
        stretches(stages, 22, {"a": 10, "b": 4}, drop_exhausted=True)


def test_the_others_take_the_place_of_a_corpus_that_is_dropped():
    samples = staged([StageText(0, {"a": 0.5, "b": 0.25, "c": 0.25})], 400, {"a": 100}, drop_exhausted=True)
    names = [samples.sample(index)[0] for index in range(400)]
    assert names.count("a") == 100
    assert "a" not in names[201:]
    assert abs(names.count("b") - names.count("c")) <= 2
