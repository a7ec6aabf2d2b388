"""A save in the background holds the state of its step, whatever training does meanwhile, and tells all ranks how it ended."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.faulty_storage import create, set_faults
from tests.parallel.layouts import LEARNING_RATE, micro_batches, world_size
from tests.parallel.test_layouts import layout_config
from tests.saving import save_now
from tests.slow import slow_except
from w1train.checkpoints import saver as saver_module
from w1train.checkpoints.loading import load_checkpoint
from w1train.checkpoints.manifest import CheckpointError, Progress, complete_steps, read_progress
from w1train.checkpoints.saver import CheckpointSaver
from w1train.config.schema_operation import CheckpointConfig
from w1train.engine.building import build_trained_model
from w1train.planning.state import PRECISION_BYTES, StateBytes, staging_bytes
from w1train.runtime.distributed import distributed
from w1train.runtime.pulse import pulse
from w1train.training.forward import run_micro_batches

TIMEOUT = 30.0


class Steps:
    """Training, a step at a time."""

    def __init__(self, config: Any, ranks: Any) -> None:
        self.config, self.ranks, self.model, self.number = config, ranks, build_trained_model(config), 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            batches = list(micro_batches(self.config, self.number, self.ranks.data_parallel_rank, self.ranks.data_parallel_size))
            for chunk in self.model.chunks:
                chunk.zero_grad_buffer()
            self.model.optimizer.zero_grad()
            run_micro_batches(self.config, list(self.model.chunks), iter(batches), len(batches), training=True)
            for group in self.model.optimizer.param_groups:
                group["lr"] = LEARNING_RATE
            self.model.optimizer.step()
            self.number += 1
        self.model.gather_parameters()


def on_ranks(function: Callable[[Steps], Any], data_parallel: int = 2, precision: Any = "bf16", **parallel: Any) -> list[Any]:
    """``function(training)`` on the ranks of a layout."""
    config = layout_config("one-stream", data_parallel, **parallel)
    config.training.precision = precision

    def main(_rank: int, _size: int) -> Any:
        with distributed(config.parallel) as ranks:
            return function(Steps(config, ranks))

    return run_distributed(main, world_size(config, data_parallel), process_group=False)


class Gate:
    """Holds the writing of shards back until it is opened."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        original = saver_module.write_part

        def write_part(*args: Any) -> int:
            assert self.is_open.wait(TIMEOUT)
            return original(*args)

        saver_module.write_part = write_part


def shards(path: Path) -> dict[str, Any]:
    """Hashes of the files that hold the state."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".shards")}


def poll_until_done(saver: CheckpointSaver) -> None:
    while saver.is_saving:
        saver.poll()


@pytest.mark.parametrize("parallel", slow_except([{}], [{}, {"tensor": 2, "data_parallel": 1}, {"distributed_optimizer": False}]), ids=str)
def test_the_state_is_that_of_the_step_and_the_bytes_are_those_of_a_save_that_is_waited_for(tmp_path, parallel):
    def save(training: Steps) -> None:
        gate = Gate()
        saver = CheckpointSaver(tmp_path / "background", training.model, CheckpointConfig(keep=9), "")
        for _ in range(2):  # the second into the memory of the first
            training.step()
            saver.poll()
            progress = Progress(step=training.number, health={"window": {"grad_norm": [1.0]}})
            gate.is_open.set()
            save_now(tmp_path / "waited", training.model, progress)
            gate.is_open.clear()
            saver.save(progress)
            progress.step = 999  # the saver has its own
            progress.health["window"]["grad_norm"].append(2.0)
            training.step(2)
            saver.poll()
            assert saver.is_saving
            gate.is_open.set()
            poll_until_done(saver)
        saver.close()

    on_ranks(save, **parallel)
    assert complete_steps(tmp_path / "background") == complete_steps(tmp_path / "waited") == [1, 4]
    for step in (1, 4):
        name = f"step_{step:010d}"
        assert shards(tmp_path / "background" / name) == shards(tmp_path / "waited" / name)
        assert read_progress(tmp_path / "background" / name) == Progress(step=step, health={"window": {"grad_norm": [1.0]}})
    assert shards(tmp_path / "waited/step_0000000001") != shards(tmp_path / "waited/step_0000000004")
    assert not list((tmp_path / "background").glob(".*"))


def test_what_was_saved_in_the_background_loads_under_another_layout(tmp_path):
    def save(training: Steps) -> None:
        training.step(2)
        saver = CheckpointSaver(tmp_path, training.model, CheckpointConfig(), "")
        saver.save(Progress(step=2))
        training.step()
        saver.close()

    on_ranks(save)

    def load(training: Steps) -> int:
        progress = load_checkpoint(tmp_path / "step_0000000002", training.model)
        save_now(tmp_path / "again", training.model, progress)
        return progress.step

    assert on_ranks(load, data_parallel=1, tensor=2) == [2, 2]


def failing_once(rank: int, error: Exception) -> None:
    """The first part that a rank writes is not written."""
    import torch.distributed as dist

    original, failures = saver_module.write_part, [error]

    def write_part(*args: Any) -> int:
        if dist.get_rank() == rank and failures:
            raise failures.pop()
        return original(*args)

    saver_module.write_part = write_part


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_is_said_and_the_next_one_is_made(tmp_path, asynchronous):
    def save(training: Steps) -> list[str]:
        said: list[str] = []
        saver_module.logger.warning = lambda text, *args: said.append(text % args)  # type: ignore[method-assign]
        settings = CheckpointConfig(keep=2, asynchronous=asynchronous)
        saver = CheckpointSaver(tmp_path, training.model, settings, "")
        training.step()
        saver.save(Progress(step=1))
        saver.wait()
        failing_once(1, OSError(28, "No space left on device"))
        training.step()
        saver.save(Progress(step=2))
        poll_until_done(saver)
        assert complete_steps(tmp_path) == [1]
        assert not list(tmp_path.glob(".*"))
        with pytest.raises(CheckpointError, match=r"step_0000000002.* rank 1: .*No space left"):
            saver.require_saved()
        training.step()
        saver.save(Progress(step=3))
        saver.close()  # the newest is there: nothing is wrong any more
        return said

    said = on_ranks(save)
    assert complete_steps(tmp_path) == [1, 3]
    (warning,) = said[0]
    assert "could not save" in warning
    assert "The checkpoint of step 1 is untouched" in warning
    assert "Training continues" in warning
    assert said[1] == []


def test_a_save_that_fails_stops_all_ranks_at_a_later_step(tmp_path):
    def save(training: Steps) -> str:
        failing_once(0, OSError(28, "No space left on device"))
        saver = CheckpointSaver(tmp_path, training.model, CheckpointConfig(on_error="stop"), "")
        training.step()
        saver.save(Progress(step=1))

        def train_on() -> None:
            while True:
                training.step()
                saver.poll()

        with pytest.raises(CheckpointError) as error:
            train_on()
        return str(error.value)

    one, other = on_ranks(save)
    assert one == other
    assert "rank 0: a file could not be written to its end" in one
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_ours_is_no_full_disk(tmp_path):
    def save(training: Steps) -> None:
        failing_once(0, IndexError("a bug"))
        saver = CheckpointSaver(tmp_path, training.model, CheckpointConfig(), "")
        training.step()
        saver.save(Progress(step=1))
        saver.wait()

    with pytest.raises(IndexError, match="a bug"):
        on_ranks(save, data_parallel=1)


def test_the_next_save_waits_and_that_is_stall(tmp_path):
    def save(training: Steps) -> float:
        gate = Gate()
        saver = CheckpointSaver(tmp_path, training.model, CheckpointConfig(), "")
        training.step()
        saver.save(Progress(step=1))
        first = saver.times.take()["checkpoint/stall_seconds"]
        assert complete_steps(tmp_path) == []
        threading.Timer(1.0, gate.is_open.set).start()
        training.step()
        saver.save(Progress(step=2))
        assert complete_steps(tmp_path) == [1]
        saver.save(Progress(step=2))  # as when a signal comes at a step that is saved anyway
        assert not saver.is_saving
        second = saver.times.take()["checkpoint/stall_seconds"]
        saver.close()
        assert complete_steps(tmp_path) == [1, 2]
        return second - first

    (longer,) = on_ranks(save, data_parallel=1)
    assert longer > 0.2


def test_after_an_error_of_all_ranks_the_save_under_way_is_finished(tmp_path):
    def save(training: Steps) -> None:
        from w1train.runtime.distributed import agreed

        saver = CheckpointSaver(tmp_path, training.model, CheckpointConfig(), "")

        def diverge() -> None:
            with saver:
                training.step()
                saver.save(Progress(step=1))
                raise agreed(FloatingPointError("loss is nan"))

        with pytest.raises(FloatingPointError):
            diverge()

    on_ranks(save)
    assert complete_steps(tmp_path) == [1]


def test_checkpoints_go_away_and_come_back(tmp_path):
    """file:// in place of object storage."""
    remote = tmp_path / "remote"

    def save(training: Steps) -> None:
        settings = CheckpointConfig(keep=2, keep_every=3, upload=f"file://{remote}")
        saver = CheckpointSaver(tmp_path / "run", training.model, settings, "")
        for step in range(1, 7):
            training.step()
            saver.save(Progress(step=step))
            saver.close()

    on_ranks(save)
    assert complete_steps(tmp_path / "run") == complete_steps(remote) == [3, 5, 6]
    for step in (3, 6):
        name = f"step_{step:010d}"
        assert (remote / name / "manifest.json").read_bytes() == (tmp_path / "run" / name / "manifest.json").read_bytes()
        assert shards(remote / name) == shards(tmp_path / "run" / name)

    def fetch(_training: Steps) -> int | None:
        from w1train.checkpoints.recovery import choose_checkpoint

        (tmp_path / "new").mkdir(exist_ok=True)
        return choose_checkpoint(tmp_path / "new", CheckpointConfig(upload=f"file://{remote}"))

    shard = next((remote / "step_0000000006").glob("rank_00001.*"))
    shard.write_bytes(bytes(shard.stat().st_size))  # the copy is damaged: the one before it serves
    assert on_ranks(fetch) == [5, 5]
    assert complete_steps(tmp_path / "new") == [5]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step_0000000005"], "a bad copy is none of the run's checkpoints"

    def go_back(_training: Steps) -> int | None:
        from w1train.checkpoints.recovery import choose_checkpoint

        choose_checkpoint(tmp_path / "run", CheckpointConfig(upload=f"file://{remote}", resume_step=3))
        shutil.rmtree(tmp_path / "run")  # before a step that is done again has been copied
        (tmp_path / "run").mkdir()
        return choose_checkpoint(tmp_path / "run", CheckpointConfig(upload=f"file://{remote}"))

    assert on_ranks(go_back, data_parallel=1) == [3]
    shutil.rmtree(remote)


def test_a_last_upload_that_gets_on_is_no_hang(tmp_path):
    class Upload:
        """Every second look finds another file sent."""

        looks = num_sent = 0

        @property
        def is_busy(self) -> bool:
            self.looks += 1
            self.num_sent = self.looks // 2
            return self.looks < 6

        def describe(self) -> str:
            return "an upload"

        def try_again(self) -> bool:
            return False

        def steps_in_use(self) -> list[int]:
            return []

    def close(training: Steps) -> int:
        saver, beats = CheckpointSaver(tmp_path, training.model, CheckpointConfig(), ""), list[int]()
        saver._uploader = cast(Any, Upload())
        pulse.observer = lambda: beats.append(1)
        saver.close()
        return len(beats)

    assert on_ranks(close, data_parallel=1) == [2]


@pytest.mark.slow
def test_the_checkpoints_that_stay_do_not_depend_on_the_storage(tmp_path):
    """What is being sent stays for that, and goes at the end. A storage that takes nothing holds the end up for a bounded time."""
    url = create(tmp_path / "bucket")
    faults: dict[str, dict[str, Any]] = {"held": {"held": ["put"]}, "slow": {"slow_seconds": 0.02}}

    def save(training: Steps) -> list[str]:
        logs = []
        for name in faults:
            logs.append(tmp_path / f"{name}-{dist.get_rank()}")
            logging.basicConfig(filename=logs[-1], level=logging.INFO, format="%(message)s", force=True)
            dist.barrier()
            if dist.get_rank() == 0:
                set_faults(tmp_path / "bucket", **faults[name])
            saver = CheckpointSaver(tmp_path / name, training.model, CheckpointConfig(keep=1, upload=url), "", upload_patience=0.3)
            for step in range(1, 5):
                training.step()
                saver.save(Progress(step=step))
                saver.poll()
            saver.close()
        return [log.read_text() for log in logs]

    (held, slow), others = on_ranks(save)
    assert [complete_steps(tmp_path / name) for name in faults] == [[4], [4]]
    assert f"to {url}, as long as something arrives every 0 s" in held
    assert re.search(r"nothing arrived in .* for \d+ s: the run ends without a copy of its newest checkpoint there", held)
    assert "nothing arrived" not in slow
    assert complete_steps(tmp_path / "bucket") == [4]
    assert not any("upload" in other for other in others)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("sharded", [True, False])
def test_planned_host_memory_is_what_is_taken(tmp_path, precision, sharded):
    def save(training: Steps) -> tuple[int, int]:
        saver = CheckpointSaver(tmp_path, training.model, CheckpointConfig(), "")
        training.step()
        saver.poll()
        saver._staging._touched.result()
        return sum(buffer.nbytes for buffer in saver._staging._buffers), sum(
            parameter.numel() for parameter in training.model.chunks[0].parameters()
        )

    found = on_ranks(save, precision=precision, distributed_optimizer=sharded)
    numel, size = found[0][1], PRECISION_BYTES[precision]
    copies = 3 if precision == "bf16" else 2
    state = StateBytes(size * numel, 4 * numel, 4 * copies * numel // (2 if sharded else 1), numel // (2 if sharded else 1))
    planned = staging_bytes(state, precision, 2, distributed=sharded)
    assert sum(staged for staged, _ in found) == 2 * planned
    assert all(staged == pytest.approx(planned, rel=0.05) for staged, _ in found)
