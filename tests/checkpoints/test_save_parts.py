"""The pieces of a save: boxes, who writes what, files with their hashes, memory, times, and what stays."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import pickle
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint_files import whole_tensors
from tests.distributed import run_distributed
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.checkpoints import commit  # noqa: E402
from w1train.checkpoints.format.shard_files import describe_write_error, write_index, write_part  # noqa: E402
from w1train.checkpoints.format.shard_plan import Box, deal, require_whole  # noqa: E402
from w1train.checkpoints.manifest import CheckpointError, DamagedCheckpointError  # noqa: E402
from w1train.checkpoints.retention import kept_steps, rank_steps  # noqa: E402
from w1train.checkpoints.save_times import SaveTimes  # noqa: E402
from w1train.checkpoints.staging import Staging  # noqa: E402
from w1train.checkpoints.verification import verify_checkpoint  # noqa: E402
from w1train.engine.optimizer_slices import boxes_of_range  # noqa: E402
from w1train.runtime.distributed import agreed, is_agreed  # noqa: E402


@given(sizes=st.lists(st.integers(1, 5), max_size=4), data=st.data())
def test_boxes_of_a_range_are_its_elements_in_order(sizes, data):
    numel = math.prod(sizes)
    start = data.draw(st.integers(0, numel - 1))
    end = data.draw(st.integers(start + 1, numel))
    elements = torch.arange(numel).view(sizes)
    boxes = list(boxes_of_range(start, end, sizes))
    found = [elements[tuple(slice(a, a + size) for a, size in zip(offset, box, strict=True))].reshape(-1) for offset, box in boxes]
    assert torch.equal(torch.cat(found), torch.arange(start, end))
    assert len(boxes) <= max(1, 2 * len(sizes) - 1)


@given(numbers=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=30), seed=st.integers(0, 100))
def test_each_box_is_written_once_by_one_that_holds_it(numbers, seed):
    generator = random.Random(seed)
    boxes = [Box(f"tensor{place}", (8,), torch.float32, (0,), (8,)) for place in range(len(numbers))]
    held = [[box for box, ranks in zip(boxes, numbers, strict=True) if rank in ranks] for rank in range(4)]
    for part in held:
        generator.shuffle(part)
    dealt = deal(held)
    assert sorted(box.key for part in dealt for box in part) == sorted(box.key for box in boxes)
    assert all(set(part) <= set(mine) for part, mine in zip(dealt, held, strict=True))
    everywhere = sum(len(ranks) == 4 for ranks in numbers)
    if everywhere == len(numbers):
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_a_tensor_with_a_hole_is_no_checkpoint():
    half = Box("weight", (4, 2), torch.float32, (0, 0), (2, 2))
    with pytest.raises(AssertionError, match=r"weight: 4 elements are held, of \(4, 2\)"):
        require_whole([half])


def test_files_hold_the_boxes_alone_and_are_hashed_as_they_are(tmp_path):
    whole = torch.arange(24, dtype=torch.float32).view(6, 4)
    boxes = [Box("weight", (6, 4), torch.float32, (row, 0), (3, 4)) for row in (0, 3)]
    for rank, box in enumerate(boxes):
        # A view of memory that holds more: only the view may reach the file.
        write_part(tmp_path, rank, [box], [whole[box.offset[0] : box.offset[0] + 3]], {})
    files = write_index(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_00000.shards", "rank_00001.shards", "shards.json"]
    for name, entry in files.items():
        content = (tmp_path / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert [entry["size"] for entry in files.values()] == [3 * 4 * 4] * 2
    assert torch.equal(whole_tensors(tmp_path)["weight"], whole)


def test_a_part_that_does_not_fit_leaves_nothing_and_says_why(tmp_path):
    def write(_rank: int, _size: int) -> str:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        box = Box("weight", (100_000,), torch.float32, (0,), (100_000,))
        with pytest.raises(OSError, match="too large") as failure:
            write_part(tmp_path / "part", 0, [box], [torch.zeros(100_000)], {})
        assert failure.value.errno == errno.EFBIG
        assert failure.value.free_bytes > 0
        return describe_write_error(failure.value)

    (text,) = run_distributed(write, 1, process_group=False)
    assert "disk full, or a quota or file size limit reached" in text
    assert list((tmp_path / "part").iterdir()) == []


def test_sizes_alone_are_compared_if_hashes_are_not(tmp_path):
    shard = tmp_path / "rank_00000.shards"
    shard.write_bytes(b"abc")
    files = {shard.name: {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}
    content = {"step": 1, "samples": 0, "seconds": 0.0, "dataset": None, "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    verify_checkpoint(tmp_path)
    shard.write_bytes(b"abd")
    verify_checkpoint(tmp_path, hashes=False)
    with pytest.raises(CheckpointError, match="has changed"):
        verify_checkpoint(tmp_path)
    shard.write_bytes(b"ab")
    with pytest.raises(CheckpointError, match="has 2 bytes, expected 3"):
        verify_checkpoint(tmp_path, hashes=False)


def test_a_checkpoint_in_the_way_is_set_aside(tmp_path):
    for content in ("first", "second", "third"):
        (tmp_path / "writing").mkdir()
        (tmp_path / "writing" / "file").write_text(content)
        commit._commit(tmp_path / "writing", tmp_path / "step_0000000001")
    found = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert found == {"step_0000000001": "third", "undone-step_0000000001": "first", "undone-step_0000000001.2": "second"}


def test_staged_copies_hold_their_values_in_storages_of_their_own():
    state = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.randn(4, 4)[:, :2], torch.tensor(3.0)]

    def stage(_rank: int, _size: int) -> None:  # in a process of its own: the memory is made ready in a thread
        staging = Staging()
        before = [tensor.clone() for tensor in state]
        staged = staging.copy(state)
        places = [tensor.data_ptr() for tensor in staged]
        for tensor in state:
            tensor.add_(1)
        assert all(torch.equal(copy, value) for copy, value in zip(staged, before, strict=True))
        assert all(copy.untyped_storage().nbytes() == copy.numel() * copy.itemsize for copy in staged)
        assert [tensor.data_ptr() for tensor in staging.copy(state)] == places
        assert all(torch.equal(copy, value) for copy, value in zip(staged, state, strict=True))
        assert sum(buffer.nbytes for buffer in staging._buffers) == sum(tensor.numel() * tensor.itemsize for tensor in state)

    run_distributed(stage, 1, process_group=False)


def test_times_are_told_once():
    now = 0.0
    times = SaveTimes(lambda: now)
    for seconds in (1.0, 3.0):
        times.step(seconds, is_saving=False)
    assert times.take() == {}
    with times.stalling():
        now += 0.5
        with times.stalling():  # counted once
            now += 0.25
    with times.stalling():
        now += 0.25
    assert times.take() == {"checkpoint/stall_seconds": 1.0}
    times.step(2.5, is_saving=True)
    assert times.saved(7.0) == pytest.approx(0.25)
    assert times.take() == {"checkpoint/background_seconds": 7.0, "checkpoint/background_dip": pytest.approx(0.25)}
    assert times.saved(1.0) is None, "no step ran beside it"
    times.restarted(9.0)
    assert times.take() == {"checkpoint/background_seconds": 1.0, "checkpoint/restart_seconds": 9.0}
    assert times.take() == {}


@given(st.sets(st.integers(1, 60)), st.integers(1, 4), st.integers(0, 12))
def test_what_is_kept_for_ever_stays(steps, keep, every):
    kept = kept_steps(steps, [], keep, every)
    assert kept <= steps
    assert set(sorted(steps)[-keep:]) <= kept
    assert all((step in kept) == (step % every == 0 if every else False) for step in sorted(steps)[:-keep])


def test_ranking_leaves_out_what_has_no_score():
    assert rank_steps({1: 2.0, 2: None, 3: math.nan, 4: 1.0, 5: 2.0}, 2, "elbo") == [4, 5]
    assert rank_steps({1: 2.0, 2: 10**400, 3: -(10**400), 4: math.inf, 5: -math.inf}, 5, "elbo") == [1]
    assert rank_steps({1: 0.5, 2: 0.75, 3: 0.6}, 2, "preference_accuracy") == [2, 3], "higher is better"


def test_damage_is_the_same_error_on_another_rank():
    """Ranks exchange their errors by pickle."""
    error = agreed(DamagedCheckpointError(Path("run/step_0000000003"), ["a is missing", "b has changed"]))
    received = pickle.loads(pickle.dumps(error))
    assert str(received) == str(error)
    assert str(error).startswith("run/step_0000000003 is damaged: a is missing; b has changed. ")
    assert (received.path, received.reason) == (Path("run/step_0000000003"), "a is missing; b has changed")
    assert is_agreed(received)
