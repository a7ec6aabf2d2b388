"""The average of checkpoints is the naive one to the last bit, whatever layout saved them, and trains on as if it had been trained."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tests.checkpoint_files import vouch, whole_tensors
from tests.distributed import run_distributed
from tests.parallel.layouts import LEARNING_RATE, micro_batches, open_gates, train_layout, world_size
from tests.parallel.test_layouts import layout_config
from tests.saving import save_now
from tests.slow import slow_except
from w1train.checkpoints.averaging import average_steps, find_checkpoint
from w1train.checkpoints.commit import write_complete
from w1train.checkpoints.format.shard_files import write_index, write_part
from w1train.checkpoints.format.shard_plan import Box
from w1train.checkpoints.format.shard_reader import Shards
from w1train.checkpoints.loading import load_checkpoint, load_model_weights
from w1train.checkpoints.manifest import CheckpointError, Progress, complete_steps, latest_step, read_progress
from w1train.config.errors import UserError
from w1train.engine.building import build_trained_model
from w1train.runtime.distributed import distributed, initialize_process_group
from w1train.training.forward import run_micro_batches

STEPS = (1, 2, 4)


def average_alone(directory: Path, steps=STEPS, output: Path | None = None) -> Path:
    """On one process, as the command does."""

    def average(_rank: int, _size: int) -> Path:
        initialize_process_group(torch.device("cpu"))
        return average_steps(directory, steps, output)

    return run_distributed(average, 1, process_group=False)[0]


def train_and_save(directory: Path, config, data_parallel: int = 1, *, steps=STEPS, load: Path | None = None) -> None:
    """A short run that saves at some steps."""

    def train(_rank: int, _size: int) -> None:
        with distributed(config.parallel) as ranks:
            model = build_trained_model(config)
            open_gates(model)
            first = load_checkpoint(load, model).step if load is not None else 0
            for step in range(first, max(steps)):
                batches = list(micro_batches(config, step, ranks.data_parallel_rank, ranks.data_parallel_size))
                for chunk in model.chunks:
                    chunk.zero_grad_buffer()
                model.optimizer.zero_grad()
                run_micro_batches(config, list(model.chunks), iter(batches), len(batches), training=True)
                for group in model.optimizer.param_groups:
                    group["lr"] = LEARNING_RATE
                model.optimizer.step()
                if step + 1 in steps:
                    save_now(directory, model, Progress(step=step + 1))

    run_distributed(train, world_size(config, data_parallel), process_group=False)


LAYOUTS = [
    ({}, 1, "fp32"),
    ({"tensor": 2, "sequence": True}, 2, "fp32"),
    ({"distributed_optimizer": False}, 1, "bf16"),
    ({"pipeline": 2, "virtual_pipeline": 2}, 1, "bf16"),
]


@pytest.fixture(scope="module", params=slow_except(LAYOUTS[1::2], LAYOUTS), ids=str)
def run(request, tmp_path_factory):
    parallel, data_parallel, precision = request.param
    config = layout_config("one-stream", **parallel)
    config.training.precision = precision
    directory = tmp_path_factory.mktemp("run")
    train_and_save(directory, config, data_parallel)
    return directory, config


def masters_of(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """The fp32 weights behind a weight."""
    for prefix in ("optimizer.state.param.", "optimizer.state.fp32_param."):
        if prefix + key in tensors:
            return tensors[prefix + key]
    return tensors[key]


def test_weights_and_masters_are_the_naive_average_to_the_last_bit(run):
    directory, config = run
    found = whole_tensors(average_alone(directory))
    a, b, c = (whole_tensors(directory / f"step_{step:010d}") for step in STEPS)
    weights = [key for key in found if not key.startswith("optimizer.")]
    assert all(torch.equal(a[key], masters_of(a, key).to(a[key].dtype)) for key in weights), "what a member's weights are"
    assert len(weights) > 10
    for key in weights:
        expected = (masters_of(a, key) + masters_of(b, key) + masters_of(c, key)) / 3
        assert expected.dtype == torch.float32
        assert torch.equal(masters_of(found, key).float(), expected), key
        assert torch.equal(found[key], expected.to(found[key].dtype)), key
        assert not torch.equal(masters_of(a, key), masters_of(c, key)), f"{key} was not trained: the test shows nothing"
    moments = [key for key in found if ".exp_avg" in key]
    assert len(moments) == 2 * len(weights)
    assert all(torch.equal(found[key], c[key]) for key in moments)
    if config.training.precision == "bf16":
        assert found[weights[0]].dtype == torch.bfloat16
        assert masters_of(found, weights[0]).dtype == torch.float32


def test_the_ranks_of_a_group_share_the_work_and_agree_with_one_process(run, tmp_path):
    directory, _ = run
    alone = whole_tensors(average_alone(directory))

    def average(_rank: int, _size: int) -> None:
        average_steps(directory, STEPS, tmp_path / "together")

    run_distributed(average, 3)
    together = whole_tensors(tmp_path / "together")
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[key], alone[key]) for key in alone)
    assert len(list((tmp_path / "together").glob("*.shards"))) == 3


def test_training_goes_on_from_the_average(run):
    """From its weights, not from the newest member's masters; and in another layout."""
    directory, config = run
    path = average_alone(directory)
    single = layout_config("one-stream", distributed_optimizer=config.parallel.distributed_optimizer)
    single.training.precision = config.training.precision
    found = train_layout(single, load=path, num_steps=1)
    newest = directory / f"step_{STEPS[-1]:010d}"

    def take_weights(model) -> None:
        load_model_weights(path, model.stages)
        if config.training.precision == "fp32":  # in bf16 the weights do not know what the masters were rounded from
            model.optimizer.reload_model_params()

    expected = train_layout(single, load=newest, num_steps=1, mutate=take_weights)
    stale = train_layout(single, load=newest, num_steps=1)
    assert found.losses == expected.losses
    assert found.losses != stale.losses
    if config.training.precision == "fp32":
        assert all(torch.equal(found.parameters[name], expected.parameters[name]) for name in expected.parameters)
        assert not any(torch.equal(found.parameters[name], stale.parameters[name]) for name in expected.parameters)


def test_it_stands_where_its_newest_member_stood(run):
    directory, _ = run
    path = average_alone(directory)
    assert read_progress(path) == read_progress(directory / f"step_{STEPS[-1]:010d}")
    assert latest_step(directory) == STEPS[-1]
    assert complete_steps(directory) == list(STEPS)
    assert find_checkpoint(directory, "average") == path
    assert find_checkpoint(directory, path.name) == path
    assert find_checkpoint(directory, f"step_{STEPS[0]:010d}") == find_checkpoint(directory, STEPS[0])
    assert find_checkpoint(directory, None).name == find_checkpoint(directory, STEPS[-1]).name == f"step_{STEPS[-1]:010d}"
    assert json.loads((path / "manifest.json").read_text())["average"]["steps"] == list(STEPS)


def test_the_average_that_was_written_last_is_found_whatever_the_clock_says(run):
    directory, _ = run
    for steps in (STEPS[:2], STEPS[1:]):
        path = average_alone(directory, steps)
        shutil.rmtree(path)
    first, last = average_alone(directory, STEPS[1:]), average_alone(directory, STEPS[:2])
    try:
        os.utime(last / "manifest.json", (0, 0))
        assert find_checkpoint(directory, "average") == last
    finally:
        for path in (first, last):
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run that was resumed in other layouts: its checkpoints have other shards."""
    directory = tmp_path_factory.mktemp("mixed")
    previous = None
    for step, parallel in [(1, {"tensor": 2}), (2, {"pipeline": 2}), (3, {})]:
        train_and_save(directory, layout_config("one-stream", **parallel), steps=(step,), load=previous)
        previous = directory / f"step_{step:010d}"
    return directory


def test_members_of_other_layouts(mixed):
    found = whole_tensors(average_alone(mixed, (1, 2, 3)))
    a, b, c = (whole_tensors(mixed / f"step_{step:010d}") for step in (1, 2, 3))
    assert all(torch.equal(found[key], (a[key] + b[key] + c[key]) / 3) for key in found if ".exp_avg" not in key)


def test_it_is_written_once_and_again_when_its_members_have_changed(mixed, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(mixed, directory)
    path = average_alone(directory, (1, 2))
    written = (path / "shards.json").stat().st_mtime_ns
    assert average_alone(directory, (2, 1)) == path
    assert (path / "shards.json").stat().st_mtime_ns == written
    before = whole_tensors(path)
    shutil.rmtree(directory / "step_0000000002")
    shutil.copytree(directory / "step_0000000003", directory / "step_0000000002")
    assert average_alone(directory, (1, 2)) == path
    key = "output_layer.weight"
    assert not torch.equal(whole_tensors(path)[key], before[key])


def test_a_damaged_or_foreign_member_is_refused(mixed, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(mixed, directory)
    shard = next((directory / "step_0000000002").glob("*.shards"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_0000000002 is damaged: rank_00000.shards has changed"):
        average_alone(directory, (1, 2))
    shutil.rmtree(directory / "step_0000000002")
    foreign = layout_config("one-stream")
    foreign.model.ffn_hidden_size *= 2
    train_and_save(directory, foreign, steps=(2,))
    with pytest.raises(UserError, match=r"does not fit .* tensors differ in name or size, first decoder.layers.mlp.linear_fc1"):
        average_alone(directory, (1, 2))
    assert not list(directory.glob("average_0000000002_*"))
    assert not list(directory.glob(".*"))


def _edit_index(member: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of an index, and have the manifest vouch for it."""
    index = json.loads((member / "shards.json").read_bytes())
    change(index["tensors"])
    (member / "shards.json").write_text(json.dumps(index))
    vouch(member)


def _with_another_dimension(tensors: dict) -> None:
    master = tensors["optimizer.state.param.weight"]
    master["sizes"].append(1)
    for shard in master["shards"]:
        shard[2].append(0)
        shard[3].append(1)


def _with_an_average_of_forty_digits(directory: Path) -> None:
    """Put an average whose number is the largest that parse_json reads into the directory."""
    average = shutil.copytree(directory / "step_0000000001", directory / "average_0000000001_00000000")
    manifest = json.loads((average / "manifest.json").read_bytes())
    (average / "manifest.json").write_text(json.dumps({**manifest, "average_number": 10**40 - 1}))


def _with_a_sparse_tensor(member: Path) -> None:
    """Add a tensor of 64 MiB whose file has no data."""
    with (member / "sparse.shards").open("wb") as file:
        file.truncate(1 << 26)
    sizes = [1 << 18, 64]
    _edit_index(member, lambda tensors: tensors.update(more={"dtype": "float32", "sizes": sizes, "shards": [_box("sparse.shards", sizes)]}))


def _box(file: str, sizes: list[int]) -> list:
    return [file, 0, [0] * len(sizes), sizes]


def test_members_that_somebody_made_up_are_refused(tmp_path):
    tiny = _fake_members(tmp_path / "tiny", 1 << 16)
    masters, sparse, large = (shutil.copytree(tiny, tmp_path / name) for name in ("masters", "sparse", "large"))
    for step in (1, 2, 3):
        _edit_index(masters / f"step_{step:010d}", _with_another_dimension)
    with pytest.raises(CheckpointError, match=r"'optimizer.state.param.weight' has the sizes \[256, 64, 1\], and its weight \[256, 64\]"):
        average_alone(masters, (1, 2, 3))
    for step in (1, 2):
        _with_a_sparse_tensor(sparse / f"step_{step:010d}")
    with pytest.raises(CheckpointError, match=r"bytes of data, too few for tensors of 67,239,936 bytes"):
        average_alone(sparse, (1, 2))
    with (large / "step_0000000003" / "config.yaml").open("wb") as file:
        file.truncate((1 << 20) + 1)
    vouch(large / "step_0000000003")
    with pytest.raises(CheckpointError, match=r"says that config.yaml has 1,048,577 bytes; a configuration has at most 1,048,576"):
        average_alone(large, (1, 2, 3))


def test_a_number_that_cannot_be_read_again_is_not_counted_on(tmp_path):
    directory = _fake_members(tmp_path / "members", 1 << 12)
    _with_an_average_of_forty_digits(directory)
    written = average_alone(directory, (1, 2))
    assert json.loads((written / "manifest.json").read_bytes())["average_number"] == 1
    assert find_checkpoint(directory, "average") == written


def test_a_full_disk_leaves_nothing(mixed, tmp_path):
    def average(_rank: int, _size: int) -> None:
        initialize_process_group(torch.device("cpu"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        average_steps(mixed, (1, 2), tmp_path / "average")

    with pytest.raises(CheckpointError, match=r"could not save .*average"):
        run_distributed(average, 1, process_group=False)
    assert list(tmp_path.iterdir()) == []


TENSOR_BYTES = 48 << 20


def _fake_members(directory: Path, tensor_bytes: int) -> Path:
    """Three checkpoints of a weight and its master, one shard each."""
    directory.mkdir()

    def write_them(_rank: int, _size: int) -> None:
        initialize_process_group(torch.device("cpu"))
        for step in (1, 2, 3):
            sizes = (tensor_bytes // 4 // 64, 64)
            boxes = [Box(name, sizes, torch.float32, (0, 0), sizes) for name in ("weight", "optimizer.state.param.weight")]
            tensors = [torch.full(sizes, float(step))] * 2

            def write(path: Path, boxes=boxes, tensors=tensors) -> None:
                write_part(path, 0, boxes, tensors, {})
                write_index(path, 1)

            write_complete(directory / f"step_{step:010d}", write, Progress(step), "", {})

    run_distributed(write_them, 1, process_group=False)
    return directory


def _peak_bytes_above_start(action: Callable[[Path], object], directory: Path, tiny: Path) -> int:
    """Of resident memory, in a process of its own that did the same with tiny checkpoints before: the libraries' code that an action
    brings into memory is 12 MB or 29, by the size of the pages in the file system's cache."""

    def measure(_rank: int, _size: int) -> int:
        initialize_process_group(torch.device("cpu"))
        action(tiny)
        start = psutil.Process().memory_info().rss
        action(directory)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start

    return run_distributed(measure, 1, process_group=False)[0]


def _load_plainly(directory: Path) -> None:
    shards = Shards(directory / "step_0000000001")
    shards.read("weight", shards.tensors["weight"].shards[0])


@pytest.mark.slow
def test_memory_stays_under_two_tensors_above_a_plain_load(tmp_path):
    large, tiny = _fake_members(tmp_path / "large", TENSOR_BYTES), _fake_members(tmp_path / "tiny", 1 << 12)
    plain = _peak_bytes_above_start(_load_plainly, large, tiny)
    averaging = _peak_bytes_above_start(lambda directory: average_steps(directory, (1, 2, 3), directory / "average"), large, tiny)
    print(f"plain load of a tensor {plain / TENSOR_BYTES:.2f} tensors, average of three {averaging / TENSOR_BYTES:.2f} tensors")
    assert plain >= 0.95 * TENSOR_BYTES
    assert averaging < plain + 2 * TENSOR_BYTES
    # The sum and the shard that is added to it.
    assert averaging < 2.1 * TENSOR_BYTES
    assert torch.equal(whole_tensors(large / "average")["weight"], torch.full((TENSOR_BYTES // 4 // 64, 64), 2.0))
