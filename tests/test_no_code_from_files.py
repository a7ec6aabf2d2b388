"""No command can run what is in a file: the sources are searched for everything that could."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("w1train", "data_tools", "launch", "benchmarks")
CLOSED_LIST = "w1train/training/legacy_index.py"
"""Holds the one unpickler, which knows a closed list of names (tests/training/test_shard_index.py)."""
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Import nothing of these: they unpickle what they read."""
CALLS = {
    "__import__",
    "compile",
    "dist_checkpointing.load",
    "dist_checkpointing.load_common_state_dict",
    "eval",
    "exec",
    "FileSystemReader",
    "hydra.utils.instantiate",
    "instantiate",
    "np.lib.format.read_array",
    "os.popen",
    "os.system",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "torch.distributed.checkpoint.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "yaml.full_load",
    "yaml.load_all",
    "yaml.unsafe_load",
}
NAMES = ("dist_checkpointing", "FileSystemReader", "TorchDistLoadShardedStrategy", "instantiate", "load_common_state_dict")
"""Import nothing of these names: megatron-core's and torch's readers of checkpoints unpickle ``.metadata``."""


def problems(source: str, path: str = "a.py") -> list[str]:
    """Lines that can run what is in a file."""
    tree = ast.parse(source)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any("SafeLoader" in ast.unparse(base) for base in node.bases)
    }
    found = []
    for node in ast.walk(tree):
        found += [f"{path}:{node.lineno}: {text}" for text in _of_node(node, path, safe_loaders)]  # type: ignore[attr-defined]
    return found


def _of_node(node: ast.AST, path: str, safe_loaders: set[str]) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        names = [alias.name for alias in node.names]
        yield from (f"imports {module}" for module in modules if module.partition(".")[0] in MODULES)
        yield from (f"imports {name}" for name in names if name in NAMES)
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "_pickle"):
            yield "imports from pickle, which hides its calls"
    elif isinstance(node, ast.ClassDef) and path != CLOSED_LIST:
        yield from (f"an unpickler: {node.name}" for base in node.bases if "Unpickler" in ast.unparse(base))
    elif isinstance(node, ast.Call):
        yield from _of_call(node, safe_loaders)


def _of_call(call: ast.Call, safe_loaders: set[str]) -> Iterator[str]:
    name, keywords = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in CALLS:
        yield f"calls {name}"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield "calls torch.load without weights_only=True"
    if name == "yaml.load" and keywords.get("Loader") not in {"yaml.SafeLoader", "yaml.CSafeLoader", *safe_loaders}:
        yield "calls yaml.load without a SafeLoader"
    for word in ("allow_pickle", "trust_remote_code", "shell"):
        if keywords.get(word, "False") != "False":
            yield f"passes {word}={keywords[word]}"


SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_source_runs_what_is_in_a_file():
    assert len(SOURCES) > 200
    found = [problem for path in SOURCES for problem in problems(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "from pickle import load",
        "class Reader(pickle.Unpickler): pass",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "class _Loader(yaml.Loader): pass\nyaml.load(text, Loader=_Loader)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "from torch.distributed.checkpoint import FileSystemReader",
        "from megatron.core import dist_checkpointing",
        "import joblib",
    ],
)
def test_the_search_finds(source):
    assert problems(source), source


def test_the_search_lets_pass():
    source = "class _Loader(yaml.SafeLoader): pass\nyaml.load(text, Loader=_Loader)\ntorch.load(file, weights_only=True)\nmodel.eval()"
    assert problems(source) == []
