"""summary.json: the run in a few numbers, for scripts and for the report."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from w1train.config.errors import UserError
from w1train.config.reading import read_json_object, shorten
from w1train.runtime.files import write_text
from w1train.runtime.version import __version__

REQUIRED_FIELDS = (
    "name",
    "num_parameters",
    "world_size",
    "device",
    "steps",
    "tokens_seen",
    "tokens_per_second",
    "wall_seconds",
    "validation",
    "unigram_bits_per_byte",
)


def tokens_per_second(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Return a run's speed: the tokens of all its steps divided by the time of all its steps.

    The first steps count too, with the time that compilation takes. Validation, sampling and saves do not count. Every command and page
    takes the speed of a run from here. It is None without steps, as in a run that began with the last checkpoint of another run.
    """
    return mean_over_time(steps, "time/tokens_per_second")


def mean_over_time(steps: Sequence[Mapping[str, Any]], rate: str) -> float | None:
    """Return the mean of a rate over the time of the steps that have it. None if no step has it, or if no time has passed.

    Args:
        steps: records of training.
        rate: the key of a quantity per second, such as time/tokens_per_second or time/mfu.
    """
    known = [(step[rate], step["time/step_seconds"]) for step in steps if _has(step, rate) and _has(step, "time/step_seconds")]
    seconds = math.fsum(time for _, time in known)
    return math.fsum(value * time for value, time in known) / seconds if seconds else None


def _has(step: Mapping[str, Any], name: str) -> bool:
    return step.get(name) is not None and math.isfinite(step[name])


def validation_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the validation of step 0 (None if its record is lost) and the newest validation; None for a run without validation."""
    names = ("step", "elbo", "elbo_bits_per_byte", "masked_cross_entropy")
    scored = [{name: record[name] for name in names} for record in records]
    return {"start": scored[0] if scored[0]["step"] == 0 else None, "end": scored[-1]} if scored else None


def write_summary(run_dir: str | Path, fields: dict[str, Any]) -> Path:
    """Write ``run_dir/summary.json`` in one rename, and return its path. NaN and infinite values become null.

    Args:
        fields: at least REQUIRED_FIELDS. ``validation`` is {"start": record or None, "end": record} with elbo (nats per token),
            elbo_bits_per_byte and masked_cross_entropy (nats per masked token), or None for a run without validation. ``versions`` are
            those of :func:`versions` if they are not given.
    """
    missing = [name for name in REQUIRED_FIELDS if name not in fields]
    assert not missing, f"summary.json lacks {missing}"
    validation = fields["validation"] or {}
    summary = {
        **fields,
        "validation_elbo_bits_per_byte_start": (validation.get("start") or {}).get("elbo_bits_per_byte"),
        "validation_elbo_bits_per_byte_end": validation.get("end", {}).get("elbo_bits_per_byte"),
        "versions": fields.get("versions") or versions(),
    }
    path = Path(run_dir) / "summary.json"
    _write(path, summary)
    return path


def _write(path: Path, summary: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(_finite(dict(summary)), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def add_to_summary(run_dir: str | Path, fields: Mapping[str, Any]) -> None:
    """Set fields of an existing ``run_dir/summary.json``, in one rename.

    Raises:
        FileNotFoundError: the run has no summary, because it has not ended.
        UserError: the file is not a summary.
    """
    path = Path(run_dir) / "summary.json"
    _write(path, {**read_json_object(path, "summary"), **fields})


def read_steps(path: Path) -> int | None:
    """Return how many steps a summary is about, or None if there is no summary.

    Raises:
        UserError: the file is not a summary.
    """
    try:
        steps = read_json_object(path, "summary").get("steps")
    except FileNotFoundError:
        return None
    if type(steps) is not int:
        raise UserError(f"{path} is not a summary: its steps are {shorten(steps)}")
    return steps


@functools.cache
def versions() -> dict[str, str | None]:
    """Return the versions of Python, the main packages and the code. None for a package that is not installed, and for the commit outside
    a checkout.

    The first call decides: a checkout that changes during a long run is not the code that runs.
    """
    return {
        "python": platform.python_version(),
        "torch": _installed("torch"),
        "megatron-core": _installed("megatron-core"),
        "w1train": __version__,
        "git_commit": _git_commit(Path(__file__).resolve().parents[2]),
    }


@functools.cache
def code_versions() -> dict[str, str | bool | None]:
    """Return :func:`versions` with more details: whether the checkout was clean, and the packages that speed and results depend on."""
    found = versions()
    commit = found["git_commit"]
    packages = ("numpy", "triton", "tokenizers", "wandb", "transformer-engine", "nvidia-cudnn-frontend", "nvidia-nccl-cu13")
    return {
        **found,
        "git_commit": commit and commit.removesuffix("-dirty"),
        "git_dirty": commit and commit.endswith("-dirty"),
        **{name: _installed(name) for name in packages},
    }


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(root: Path) -> str | None:
    """Return the commit of the checkout ``root``, with "-dirty" if tracked files differ from it. If ``root`` is not a checkout, return the
    version that the image states.

    ``root`` itself must be the checkout: for an installed package, git would find any repository of the user that contains site-packages.
    """
    if not (root / ".git").exists():
        return os.environ.get("W1TRAIN_CODE_VERSION")
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
