"""Wheels and installed packages made of nothing, for installation steps that are tested without a network."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path


def metadata_text(name: str, version: str, requires: Sequence[str] = ()) -> str:
    return "".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {text}\n" for text in requires)])


def write_wheel(
    folder: Path, name: str, version: str, requires: Sequence[str] = (), script: str | None = None, package: Path | None = None
) -> None:
    """A wheel with one module of its name, or with the package that is given, and with a script of its name where there is one."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    sources = {f"{module}.py": f"__version__ = {version!r}\n"}
    if package is not None:
        sources = {str(path.relative_to(package.parent)): path.read_text() for path in package.rglob("*.py")}
    files = {
        **sources,
        f"{info}/METADATA": metadata_text(name, version, requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if script is not None:
        files[f"{module}-{version}.data/scripts/{name}"] = script
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100755 if ".data/scripts/" in path else 0o100644) << 16
            wheel.writestr(entry, text)


def install(folder: Path, name: str, version: str, requires: Sequence[str] = ()) -> None:
    """As if it were installed in a folder of sys.path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(metadata_text(name, version, requires))
