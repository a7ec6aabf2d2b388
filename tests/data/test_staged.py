"""Samples of several texts in one order: each dataset is read on, partners come twice."""

from dataclasses import dataclass

from w1train.data.staged import StagedSamples, Stretch, stretches


@dataclass
class Numbered:
    """A dataset whose samples are their own numbers."""

    name: str
    sequence_length: int = 4
    num_samples_per_epoch: int = 10

    def sample(self, index):
        return self.name, index


def _staged(stages):
    return StagedSamples(stretches(stages), {name: Numbered(name) for name in {prefix for _, prefix, _ in stages}})


def test_datasets_are_read_on():
    staged = _staged([(0, "a", 1), (6, "b", 1), (8, "a", 1)])
    assert [staged.sample(index) for index in range(11)] == [
        *(("a", index) for index in range(6)),
        *(("b", index) for index in range(2)),
        *(("a", index) for index in range(6, 9)),
    ]
    assert [staged.epoch(count) for count in (0, 6, 7, 8, 9)] == [0.0, 0.6, 0.1, 0.2, 0.7]


def test_partners_share_a_text_and_the_next_stage_goes_on_behind_them():
    staged = _staged([(0, "a", 1), (4, "a", 2), (10, "a", 1)])
    assert [staged.sample(index)[1] for index in range(12)] == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8]


def test_one_stage_is_its_dataset():
    assert stretches([(0, "a", 1)]) == [Stretch(0, "a", 0, 1)]
    assert [_staged([(0, "a", 1)]).sample(index) for index in (0, 7, 1000)] == [("a", 0), ("a", 7), ("a", 1000)]
