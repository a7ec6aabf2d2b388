"""Slow storage: bounded pieces that arrive whole, and who takes whose movement for progress."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed import run_distributed
from tests.runtime.test_watchdog import WAITING, ranks
from w1train.runtime import transfers
from w1train.runtime.pulse import Pulse, moved, pulse
from w1train.runtime.transfers import Movement, PiecewiseFile, together
from w1train.runtime.watchdog import describe_hang


class Recorded:
    """A file that says what was asked of it."""

    def __init__(self, file: Any) -> None:
        self.file, self.calls = file, []

    def write(self, data: memoryview) -> int:
        self.calls.append(len(data))
        return self.file.write(data)

    def flush(self) -> None:
        self.calls.append("flush")
        self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@given(pieces=st.lists(st.binary(max_size=300), max_size=6))
def test_a_file_in_pieces_is_the_same_file_and_no_call_is_large(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("file") / "file"
    with pytest.MonkeyPatch.context() as patch, path.open("wb") as raw:
        patch.setattr(transfers, "PIECE_BYTES", 16)
        patch.setattr(transfers, "SYNC_BYTES", 64)
        synced: list[int] = []
        patch.setattr(os, "fsync", lambda descriptor: synced.append(raw.tell()))
        file = Recorded(raw)
        stream = PiecewiseFile(file)
        for piece in pieces:
            assert stream.write(memoryview(piece)) == len(piece)
        assert stream.tell() == sum(map(len, pieces))
        stream.sync()
    assert path.read_bytes() == b"".join(pieces)
    assert max([call for call in file.calls if isinstance(call, int)], default=0) <= 16
    ends = [0, *synced]
    assert ends[-1] == sum(map(len, pieces))
    assert max(after - before for before, after in itertools.pairwise(ends)) < 64 + 16


def test_a_thread_that_moves_is_no_progress_of_the_main_one():
    """A save in the background would hide a training step that hangs."""
    movement, before = Movement(), pulse.progress
    thread = threading.Thread(target=moved)
    thread.start()
    thread.join()
    assert pulse.progress == before
    assert movement.is_new()
    assert not movement.is_new()
    moved()
    assert pulse.progress > before


def test_what_is_transferred_is_told_while_it_is():
    one = Pulse()

    def write() -> None:
        with one.transferring("writing x"):
            assert one.transfers == ["writing x"]
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write()
    assert one.transfers == []


@pytest.mark.parametrize("is_moving", [True, False])
def test_a_rank_that_is_done_beats_as_long_as_another_one_moves(is_moving):
    def main(rank: int, _size: int) -> tuple[int, str]:
        beats = 0

        def count() -> None:
            nonlocal beats
            beats += 1

        def action() -> str:
            if rank == 1:
                for _ in range(5):
                    time.sleep(0.1)
                    if is_moving:
                        moved()
                raise OSError("of rank 1")
            return "done"

        pulse.observer = count
        result = together(action)
        return beats, describe(result)

    def describe(result: Any) -> str:
        try:
            return result()
        except OSError as error:
            return str(error)

    found = run_distributed(main, 2)
    assert [text for _, text in found] == ["done", "of rank 1"]
    assert all((beats >= 2) == is_moving for beats, _ in found), found


def test_the_rank_whose_storage_has_stalled_is_named_before_those_that_are_behind(tmp_path: Path):
    heartbeats = ranks((5, WAITING), (5, WAITING), (4, WAITING))
    heartbeats[1].stalled = "writing a/rank_00001.shards"
    text = describe_hang(heartbeats, [], 3)
    assert text.startswith("the run waits for the storage of rank 1 on node1 (process 1")
    assert text.endswith("where no byte moves (rank 1: writing a/rank_00001.shards)")
