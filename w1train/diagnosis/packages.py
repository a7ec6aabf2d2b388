"""Findings about installed packages: their versions, and whether they are really the packages that w1train needs."""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement

from w1train.diagnosis.findings import Finding, Section, Status
from w1train.runtime.megatron_on_cpu import import_megatron
from w1train.runtime.version import __version__

_REQUIRED = ("numpy", "hydra-core", "tokenizers", "wandb", "fsspec", "psutil", "rich")
_MODULES = {"hydra-core": "hydra"}
_OPTIONAL = {
    "triton": "norms, gates, rotary embedding and loss run as plain PyTorch without it",
    "transformer-engine": "attention.backend=te and FP8 need it (the te extra)",
    "nvidia-cudnn-frontend": "attention.backend=cudnn needs it (the cudnn extra)",
    "nvidia-cutlass-dsl": "attention.backend=cudnn needs it (the cudnn extra)",
    "transformers": "w1train convert needs it (the hf extra)",
    "safetensors": "w1train convert needs it (the hf extra)",
    "pyarrow": "data_tools needs it for Parquet and Arrow (the data extra)",
}


def package_section(*, quick: bool) -> Section:
    """Return the findings about packages.

    Args:
        quick: leave out imports that may put something on a GPU.
    """
    ranges = declared_ranges()
    findings = [
        Finding("w1train", __version__, detail=code_version()),
        Finding("python", platform.python_version(), detail=sys.executable),
        *_torch(ranges),
        _megatron(ranges, quick=quick),
        *(_required(name, ranges) for name in _REQUIRED),
        *(_optional(name, ranges) for name in _OPTIONAL),
        apex_finding(),
        dali_finding(ranges),
    ]
    return Section("installed", findings)


def code_version() -> str:
    """Return the directory of the package and, in an image (docker/), the version of the code that it was built from."""
    version = os.environ.get("W1TRAIN_CODE_VERSION")
    return f"{Path(__file__).resolve().parents[1]}{f', built from {version}' if version else ''}"


def declared_ranges() -> dict[str, Requirement]:
    """Return the requirements in w1train's own metadata, extras included; empty if w1train is not installed."""
    try:
        texts = metadata.requires("w1train") or []
    except metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(text) for text in texts]
    return {requirement.name: requirement for requirement in requirements}


def installed_version(name: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def out_of_range(name: str, version: str, ranges: dict[str, Requirement]) -> str:
    """Return the requirement that a version does not meet; empty if it does. NVIDIA's torch 2.13.0a0 counts as 2.13."""
    if name not in ranges or ranges[name].specifier.contains(re.sub(r"a0\b.*", "", version), prereleases=True):
        return ""
    return f"w1train wants {name}{ranges[name].specifier}"


def _torch(ranges: dict[str, Requirement]) -> Iterator[Finding]:
    wrong = out_of_range("torch", torch.__version__, ranges)
    yield Finding("torch", torch.__version__, "failed" if wrong else "ok", wrong)
    if torch.version.cuda is None:
        yield Finding("CUDA", "torch is built without it", "note")
        return
    yield Finding("CUDA", torch.version.cuda, detail="torch is built with it")
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    yield Finding("cuDNN", "not asked: no GPU" if cudnn is None else str(cudnn), "note" if cudnn is None else "ok")
    yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def _megatron(ranges: dict[str, Requirement], *, quick: bool) -> Finding:
    version = installed_version("megatron-core") or "absent"
    wrong = out_of_range("megatron-core", version, ranges) if version != "absent" else "w1train does not run without it"
    # megatron-core imports transformer-engine, which may open the GPU.
    if quick and torch.cuda.is_available():
        return Finding("megatron-core", version, "failed" if wrong else "ok", wrong or "not imported: a training may be using the GPU")
    try:
        import_megatron()
    except (ImportError, OSError) as error:
        # Images are built on machines without a driver.
        status: Status = "warning" if "libcuda.so" in str(error) and not torch.cuda.is_available() else "failed"
        return Finding("megatron-core", version, status, f"cannot be imported: {error}")
    return Finding("megatron-core", version, "failed" if wrong else "ok", wrong)


def _required(name: str, ranges: dict[str, Requirement]) -> Finding:
    version = installed_version(name)
    if version is None:
        return Finding(name, "absent", "failed", "w1train does not run without it")
    try:
        importlib.import_module(_MODULES.get(name, name))
    except ImportError as error:
        return Finding(name, version, "failed", f"cannot be imported: {error}")
    wrong = out_of_range(name, version, ranges)
    return Finding(name, version, "failed" if wrong else "ok", wrong)


def _optional(name: str, ranges: dict[str, Requirement]) -> Finding:
    version = installed_version(name)
    if version is None:
        return Finding(name, "absent", "note", _OPTIONAL[name])
    wrong = out_of_range(name, version, ranges)
    return Finding(name, version, "warning" if wrong else "ok", wrong)


def apex_finding() -> Finding:
    """Distinguish NVIDIA's apex from PyPI's package of that name, which is a web toolkit; megatron-core would import either of them."""
    spec = find_spec("apex")
    if spec is None:
        return Finding("apex", "absent", "note", "w1train does not need it; NVIDIA's images have it")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    version = installed_version("apex") or "unknown version"
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return Finding("apex", version, "failed", "this is PyPI's package of that name, not NVIDIA's: pip uninstall apex")
    compiled = find_spec("amp_C") is not None
    return Finding("apex", version, "ok" if compiled else "warning", "NVIDIA's" + ("" if compiled else ", built without its CUDA kernels"))


def dali_finding(ranges: dict[str, Requirement]) -> Finding:
    """Distinguish NVIDIA DALI, whose package name has the CUDA version in it, from the placeholder, whose name has no version."""
    for distribution in metadata.distributions():
        name = distribution.name or ""
        if name.startswith("nvidia-dali-cuda"):
            wrong = out_of_range(name, distribution.version, ranges)
            return Finding("DALI", f"{distribution.version} ({name})", "warning" if wrong else "ok", wrong)
    if installed_version("nvidia-dali") is not None:
        return Finding("DALI", "placeholder", "warning", "nvidia-dali on PyPI is empty: install nvidia-dali-cuda130 (the dali extra)")
    return Finding("DALI", "absent", "note", "data.loader=dali needs it (the dali extra)")
