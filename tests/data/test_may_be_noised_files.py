"""PREFIX.may_be_noised when it is damaged, and when it is written, interrupted and replaced."""

from __future__ import annotations

import itertools
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools import inspect, verify
from tests.data.kill import ends_before
from tests.data.test_may_be_noised import LENGTH, write_flagged
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.loader import collate_run
from w1train.data.packed.packing import PackedDataset
from w1train.data.writer import DatasetWriter, ResumeError, publish


@pytest.fixture
def damaged(tokenizer, tmp_path):
    """A dataset that a test may damage, and its file."""
    dataset, _ = write_flagged(tmp_path / "x", tokenizer, num_documents=5)
    return dataset, Path(f"{dataset.prefix}.may_be_noised")


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_refused(damaged, with_manifest, change):
    dataset, path = damaged
    os.truncate(path, dataset.num_tokens + change)
    if not with_manifest:
        Path(f"{dataset.prefix}.json").unlink()
    fault = "truncated" if change < 0 else "longer than it was written"
    with pytest.raises(DatasetError, match=rf"x\.may_be_noised is {fault}: .* expected {dataset.num_tokens}"):
        TokenDataset.open(dataset.prefix)


def test_a_missing_file_and_one_that_is_not_listed_are_refused(damaged, make_dataset, tmp_path):
    dataset, path = damaged
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DatasetError, match=r"x\.may_be_noised does not exist"):
        TokenDataset.open(dataset.prefix)
    plain = make_dataset(tmp_path / "plain", [[20] * 9] * 4)
    Path(f"{plain.prefix}.may_be_noised").write_bytes(content)
    with pytest.raises(DatasetError, match=r"plain\.may_be_noised does not belong to the dataset: plain\.json does not list it"):
        TokenDataset.open(plain.prefix)


@pytest.mark.parametrize("value", [2, 255])
def test_a_value_that_is_neither_0_nor_1_is_refused_where_it_is_read(damaged, value, capsys):
    dataset, path = damaged
    content = bytearray(path.read_bytes())
    content[7] = value
    path.write_bytes(content)
    again = TokenDataset.open(dataset.prefix)
    assert len(again.read_may_be_noised(0, 7)) == 7
    message = rf"x\.may_be_noised is corrupt: the byte of token 7 is {value}, expected 0 or 1"
    for read in (lambda: again.read_may_be_noised(3, 12), lambda: collate_run(PackedDataset(again, LENGTH, 1), 100, 0)):
        with pytest.raises(DatasetError, match=message):
            read()
    assert inspect.main([dataset.prefix]) == 1
    assert "the byte of token 7 is" in capsys.readouterr().out


def test_another_value_is_found_by_the_hash(damaged):
    dataset, path = damaged
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"x\.may_be_noised is corrupt: its sha256 is"):
        TokenDataset.open(dataset.prefix).verify_hashes()
    assert verify.main([dataset.prefix]) == 1


def test_a_file_that_is_cut_short_while_it_is_used(damaged):
    dataset, path = damaged
    os.truncate(path, 3)
    with pytest.raises(DatasetError, match=r"x\.may_be_noised was truncated while it was in use"):
        dataset.read_may_be_noised(0, 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"may_be_noised_num_bytes": 3},
        {"may_be_noised_num_bytes": 0},
        {"may_be_noised_sha256": ""},
        {"may_be_noised_sha256": 7},
        {"may_be_noised_num_bytes": None},
    ],
)
def test_a_manifest_that_contradicts_itself(damaged, changes):
    path = Path(f"{damaged[0].prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DatasetError, match=r"x\.json is damaged: may_be_noised_"):
        TokenDataset.open(damaged[0].prefix)


# --- writing ---


def test_a_writer_goes_on_where_another_stopped(tokenizer, tmp_path):
    """What came after the record is cut off, and the result is that of one writer."""
    whole, flags = write_flagged(tmp_path / "whole", tokenizer, num_documents=6)
    offsets = whole.document_offsets[:]

    def add(writer, first, end):
        start, stop = int(offsets[first]), int(offsets[end])
        lengths = np.diff(offsets[first : end + 1])
        writer.add_documents(whole.read(start, stop), lengths, stop - start - (end - first), flags[start:stop])

    with DatasetWriter(tmp_path / "x", tokenizer, limits_noise=True) as writer:
        add(writer, 0, 2)
        progress = writer.progress()
        add(writer, 3, 5)
        writer.progress()
        writer.keep()
    with DatasetWriter(tmp_path / "x", tokenizer, resume=progress, limits_noise=True) as writer:
        add(writer, 2, 6)
        writer.finalize()
    for suffix in ("bin", "idx", "json", "may_be_noised"):
        assert Path(tmp_path / f"x.{suffix}").read_bytes() == Path(tmp_path / f"whole.{suffix}").read_bytes()


@pytest.mark.parametrize("fault", ["gone", "short"])
def test_a_writer_does_not_go_on_without_its_file(tokenizer, tmp_path, fault):
    with DatasetWriter(tmp_path / "x", tokenizer, limits_noise=True) as writer:
        writer.add_document([20, 21], 2, [False, True, True])
        progress = writer.progress()
        writer.keep()
    partial = tmp_path / "x.may_be_noised.partial"
    partial.unlink() if fault == "gone" else os.truncate(partial, 2)
    with pytest.raises(ResumeError, match=r"x\.may_be_noised\.partial (is gone|has 2 bytes)"):
        DatasetWriter(tmp_path / "x", tokenizer, resume=progress, limits_noise=True)
    with DatasetWriter(tmp_path / "x", tokenizer) as again:
        again.add_document([20], 1)
        again.finalize()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_a_writer_that_fails_leaves_nothing(tokenizer, tmp_path):
    with pytest.raises(AssertionError), DatasetWriter(tmp_path / "x", tokenizer, limits_noise=True) as writer:
        writer.add_document([20, 21], 2, [False, True])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [None, [True], [True, True, True, True]])
def test_a_document_comes_with_a_value_for_each_token(tokenizer, tmp_path, flags):
    with DatasetWriter(tmp_path / "x", tokenizer, limits_noise=True) as writer, pytest.raises(AssertionError):
        writer.add_document([20, 21], 2, flags)
    with DatasetWriter(tmp_path / "x", tokenizer) as writer, pytest.raises(AssertionError):
        writer.add_document([20, 21], 2, [True, True, True])


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_stopped_between_any_two_steps_of_replacing(tokenizer, tmp_path, monkeypatch, before, after):
    """A reader finds the old dataset, nothing, or the new one, each with its own flags, and the next attempt makes it good."""
    contents = {False: ([40, 41], before), True: ([50, 51, 52], after)}

    def write(prefix, is_new):
        tokens, limits_noise = contents[is_new]
        writer = DatasetWriter(prefix, tokenizer, overwrite=True, limits_noise=limits_noise)
        writer.add_document(tokens, len(tokens), [is_new] * len(tokens) + [False] if limits_noise else None)
        return writer

    def find(prefix):
        try:
            dataset = TokenDataset.open(prefix)
        except DatasetError:
            return None
        return dataset.read(0, dataset.num_tokens).tolist(), dataset.read_may_be_noised(0, dataset.num_tokens).tolist()

    possible = [
        ([*tokens, 1], [is_new] * len(tokens) + [False] if limits_noise else [True] * (len(tokens) + 1))
        for is_new, (tokens, limits_noise) in contents.items()
    ]
    for fatal_call in itertools.count(1):
        prefix = tmp_path / str(fatal_call)
        write(prefix, is_new=False).finalize()
        writer = write(prefix, is_new=True)
        manifest = writer.seal()
        writer.keep()
        is_done = ends_before(fatal_call, partial(publish, prefix, manifest), monkeypatch)
        assert find(prefix) in [*possible, None]
        publish(prefix, manifest)
        assert find(prefix) == possible[1]
        assert len(list(tmp_path.glob(f"{fatal_call}.*"))) == 3 + after
        if is_done:
            break
    assert fatal_call > 5
