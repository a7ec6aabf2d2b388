"""The average of checkpoints: the plain mean of their weights (LLaDA2.0's top-k merge, arXiv 2512.15745 section 4.3).

The average is a complete checkpoint under a name from which no run resumes by itself. It has the progress, the configuration and the Adam
moments of its newest member. The fp32 master weights are averaged as (a + b + ...) / k in the order of the steps, and the weights are the
rounded master weights: with the master weights of a member, the first optimizer step would restore that member's weights. The moments are
not averaged, because they depend only on the last tens of steps, and the moments of the newest member belong to the learning rate with
which training would continue.

Only one shard is in memory at a time, and the sum to which it is added. The ranks divide the shards among themselves.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.checkpoints.checkpoint_names import average_path, average_paths, step_path
from w1train.checkpoints.commit import remove_checkpoint, write_complete
from w1train.checkpoints.format.shard_files import shard_path, write_elements
from w1train.checkpoints.format.shard_index import Shard, ShardIndex, StoredTensor
from w1train.checkpoints.format.shard_reader import Shards
from w1train.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    DamagedCheckpointError,
    complete_steps,
    is_complete,
    read_manifest,
    read_progress,
)
from w1train.checkpoints.stored_size import require_data
from w1train.checkpoints.verification import read_config_text, verify_checkpoint
from w1train.config.errors import UserError
from w1train.config.reading import shorten
from w1train.runtime.distributed import all_or_none, on_every_rank, on_main_rank
from w1train.runtime.files import open_new
from w1train.runtime.pulse import pulse
from w1train.runtime.transfers import PiecewiseFile, together

logger = logging.getLogger(__name__)

_NUMBER = "average_number"
_NUMBERS_END = 1 << 53
"""The bound of the numbers of averages, which count from 1. A number that is not below it is not accepted: after a number of 40 digits, the
next number could not be read again."""
_OPTIMIZER = "optimizer."
# megatron-core's names of the fp32 master weights, in the distributed optimizer and in the other optimizer.
_MASTERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")


def average_steps(directory: Path, steps: Sequence[int], output: Path | None = None) -> Path:
    """Average the checkpoints of some steps of a run, unless this average exists already. Every rank calls this.

    Args:
        directory: the run's ``checkpoints``.
        output: the path of the average; None = ``average_path(directory, steps)``.

    Returns:
        The path of the average.

    Raises:
        UserError: the members do not fit together, or ``output`` is something else than this average.
        CheckpointError: a member is damaged, or the average could not be written.
    """
    members = [step_path(directory, step) for step in sorted(steps)]
    final = output or average_path(directory, steps)
    remarks = on_main_rank(lambda: {"average": {"steps": sorted(steps), "manifests": [_manifest_hash(member) for member in members]}})
    if not on_main_rank(partial(_is_there, final, remarks, may_replace=output is None)):
        number = on_main_rank(lambda: 1 + max(map(_number, average_paths(directory)), default=0))
        average_checkpoints(members, final, {**remarks, _NUMBER: number})
        logger.info("averaged the checkpoints of steps %s into %s", ", ".join(map(str, sorted(steps))), final)
    return final


def _manifest_hash(member: Path) -> str:
    read_manifest(member)  # refuses a manifest that is a link or too long, which must not be read as a whole
    return hashlib.sha256((member / MANIFEST).read_bytes()).hexdigest()


def _number(average: Path) -> int:
    """Return the position of an average in the order in which the run's averages were written, from 1 on. The times of files do not tell
    it, because clocks are set back. Return 0 for an average without such a number or without a manifest that can be read."""
    try:
        number = read_manifest(average).get(_NUMBER)
    except CheckpointError:
        return 0
    return number if type(number) is int and 0 < number < _NUMBERS_END else 0


def _is_there(final: Path, remarks: dict[str, Any], *, may_replace: bool) -> bool:
    """Tell whether the average is written already. Remove an average of checkpoints that have been replaced after it was written, because
    their steps were trained again."""
    if not final.exists():
        return False
    if is_complete(final) and read_manifest(final).get("average") == remarks["average"]:
        logger.info("%s is there already", final)
        return True
    if not may_replace:
        raise UserError(f"{final} exists and is not the average of these checkpoints; remove it, or give another --output")
    logger.info("%s is an average of checkpoints that were replaced since then: it is written again", final)
    remove_checkpoint(final)
    return False


def find_checkpoint(directory: Path, which: int | str | None) -> Path:
    """Return the path of a complete checkpoint of a run.

    Args:
        directory: the run's ``checkpoints``.
        which: a step, the name of a checkpoint, "average" for the average that was written last, or None for the newest step.

    Raises:
        UserError: there is no such checkpoint; the message lists those that exist.
    """
    steps = complete_steps(directory)
    averages = [path for path in average_paths(directory) if is_complete(path)]
    averages.sort(key=lambda path: (_number(path), (path / MANIFEST).stat().st_mtime_ns, path.name))
    by_step: dict[int | str | None, Path] = {step: step_path(directory, step) for step in steps}
    found = by_step | {path.name: path for path in (*by_step.values(), *averages)}
    if averages:
        found["average"] = averages[-1]
    if which is None and steps:
        which = steps[-1]
    if which not in found:
        wanted = "complete checkpoint" if which is None else f"checkpoint {'of step ' if isinstance(which, int) else ''}{which}"
        there = ", ".join([*map(str, steps), *(path.name for path in averages)])
        raise UserError(f"{directory.parent} has no {wanted}; it has: {there or 'none'}")
    return found[which]


def average_checkpoints(members: Sequence[Path], final: Path, remarks: dict[str, Any]) -> None:
    """Write the average of complete checkpoints, which are given with the newest last. Every rank calls this.

    Raises:
        UserError: the members do not hold the same tensors.
        CheckpointError: a member is damaged, or the average could not be written.
    """
    for member in members:
        verify_checkpoint(member, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    sources = all_or_none(lambda: _open(members))
    on_main_rank(partial(_require_data, sources))
    newest = members[-1]
    config_yaml = all_or_none(partial(read_config_text, newest))
    progress = all_or_none(partial(read_progress, newest))
    write_complete(final, partial(_write_shards, sources), progress, config_yaml, {"validation": {}, **remarks})


def _num_bytes(source: Shards) -> int:
    return sum(tensor.num_bytes(shard) for tensor in source.tensors.values() for shard in tensor.shards)


def _open(members: Sequence[Path]) -> list[Shards]:
    sources = [Shards(member) for member in members]
    expected = {key: tensor.sizes for key, tensor in sources[-1].tensors.items()}
    for source in sources:
        found = {key: tensor.sizes for key, tensor in source.tensors.items()}
        if found != expected:
            different = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
            raise UserError(
                f"{source.path} does not fit {sources[-1].path}: {len(different)} tensors differ in name or size, first "
                f"{different[0]}. Only checkpoints of one model and optimizer can be averaged"
            )
    _require_masters(sources[-1])
    return sources


def _require_data(sources: list[Shards]) -> None:
    """Refuse members whose files have too little data for the tensors of their indexes."""
    for source in sources:
        require_data(source.path, _num_bytes(source))


def _require_masters(source: Shards) -> None:
    """Compare the sizes of each weight and its master: a box of the weight is also read as a box of the master."""
    for key, tensor in source.tensors.items():
        master = _master(source, key)
        if master is not None and (sizes := source.tensors[master].sizes) != tensor.sizes:
            raise DamagedCheckpointError(
                source.path, [f"{shorten(master)} has the sizes {list(sizes)}, and its weight {list(tensor.sizes)}"]
            )


def _master(source: Shards, key: str) -> str | None:
    """Return the name of a weight's fp32 master, if it has one."""
    return next((master for prefix in _MASTERS if (master := prefix + key) in source.tensors), None)


def _write_shards(sources: list[Shards], writing: Path) -> None:
    """Write this rank's share of the average's shards. The shards are cut like those of the newest member, and are dealt to the ranks in
    turn, the largest first."""
    newest = sources[-1]
    all_of_them = [(key, tensor, shard) for key, tensor in newest.tensors.items() for shard in tensor.shards]
    order = sorted(all_of_them, key=lambda part: (-part[1].num_bytes(part[2]), part[0], part[2].offset))
    path = shard_path(writing, dist.get_rank())
    written = on_every_rank(together(partial(_write_file, path, order[dist.get_rank() :: dist.get_world_size()], sources)))
    on_main_rank(lambda: ShardIndex.join([*written, ShardIndex({}, newest.index.values)]).write(writing))


def _write_file(path: Path, parts: Sequence[tuple[str, StoredTensor, Shard]], sources: list[Shards]) -> ShardIndex:
    tensors: dict[str, StoredTensor] = {}
    with open_new(path) as file, pulse.transferring(f"writing {path}"):
        stream = PiecewiseFile(file)
        for key, tensor, shard in parts:
            before = tensors[key].shards if key in tensors else ()
            moved = replace(shard, file=path.name, start=stream.tell(), archive_bytes=None)
            tensors[key] = replace(tensor, shards=(*before, moved))
            write_elements(stream, _averaged(key, tensor, shard, sources))
        stream.sync()
    return ShardIndex(tensors)


def _averaged(key: str, tensor: StoredTensor, shard: Shard, sources: list[Shards]) -> Tensor:
    """Return a shard of the average: the mean for weights and master weights, the newest member's values for everything else (moments)."""
    newest = sources[-1]
    if not tensor.dtype.is_floating_point or (key.startswith(_OPTIMIZER) and not key.startswith(_MASTERS)):
        return newest.read(key, shard)
    return _average(sources, _master(newest, key) or key, shard).to(tensor.dtype)


def _average(sources: list[Shards], key: str, shard: Shard) -> Tensor:
    """Return the mean of a box over the sources in fp32, added in the order of the sources."""
    total = torch.empty(shard.sizes, dtype=torch.float32)
    for number, source in enumerate(sources):
        num_read = source.read_into(total, key, shard.offset, Tensor.copy_ if number == 0 else Tensor.add_)
        assert num_read == total.numel(), f"{source.path} has {num_read} of {total.numel()} elements of {key} at {shard.offset}"
    return total.div_(len(sources))
