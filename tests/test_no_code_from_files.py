"""No command can run what is in a file: the sources are searched for everything that could."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("w1train", "data_tools", "launch", "benchmarks")
CLOSED_LIST = "w1train/checkpoints/format/legacy_index.py"
"""Holds the one unpickler, which knows a closed list of names (tests/checkpoints/test_legacy_index.py)."""
IMPORTS_BY_NAME = {
    "w1train/__init__.py": "Names of the Python interface, whose modules are in a table of the file.",
    "w1train/data/text/decompress.py": "One of five names, by the compression and Python's version.",
    "w1train/diagnosis/packages.py": "Names of our own requirements.",
    "w1train/engine/adamw.py": "Names of the two libraries that have a fused Adam.",
}
"""Files that import modules whose names are not constants, and why no file of somebody else can choose the name."""
MODULE_AS_VALUE = {
    "w1train/runtime/megatron_on_cpu.py": "torch's factory functions get stand-ins, and their names are in the source.",
    "w1train/checkpoints/format/shard_index.py": "A dtype by its name, which is compared with a list first.",
}
"""Files that hand on one of MODULES, and why no file of somebody else can choose what is called."""
RUNS_MODULES = {"w1train/cli.py": "The module of a verb, from the tables of the file."}
"""Files that run a module by its name, and why no file of somebody else can choose the name."""
FORBIDDEN = (
    *("_pickle", "cloudpickle", "dill", "imp", "joblib", "jsonpickle", "marshal", "pickle", "pty", "runpy", "shelve"),
    *("asyncio.create_subprocess_shell", "os.popen", "os.system", "posix.system", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("builtins.__import__", "builtins.compile", "builtins.eval", "builtins.exec"),
    *("importlib.__import__", "importlib.machinery", "importlib.reload", "importlib.util.module_from_spec"),
    *("importlib.util.spec_from_file_location", "importlib.util.spec_from_loader"),
    *("hydra._internal", "hydra.utils"),
    "megatron.core.dist_checkpointing",
    *("numpy.lib.format.read_array", "numpy.lib.npyio", "pandas.io.pickle", "pandas.read_hdf", "pandas.read_pickle"),
    *(
        "torch.classes.load_library",
        "torch.distributed.checkpoint",
        "torch.export.load",
        "torch.hub",
        "torch.jit.load",
        "torch.ops.load_library",
    ),
    *("torch.package", "torch.serialization", "torch.utils.cpp_extension", "torch.utils.model_zoo"),
    *(f"yaml.{prefix}Loader" for prefix in ("", "C", "CFull", "CUnsafe", "Full", "Unsafe")),
    *("yaml.constructor", "yaml.cyaml", "yaml.full_load", "yaml.full_load_all", "yaml.load_all", "yaml.loader"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("codeop", "timeit", "zipimport", "operator.methodcaller"),
    *("torch._C._import_ir_module", "torch.storage._load_from_bytes", "torch._utils_internal", "xmlrpc"),
)
"""Names that run, or unpickle, what they are given, with all names below them."""
ALLOWED = (
    *("pickle.PicklingError", "pickle.UnpicklingError", "pickle.dump", "pickle.dumps"),
    *(f"megatron.core.dist_checkpointing.{name}" for name in ("dict_utils", "mapping", "optimizer", "state_dict_utils", "utils")),
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "torch.distributed.checkpoint.CheckpointException",
)
"""Names below the forbidden ones that read no file."""
_FORBIDDEN, _ALLOWED = frozenset(FORBIDDEN), frozenset(ALLOWED)
UNPICKLERS = ("_pickle.Unpickler", "pickle.Unpickler", "pickle._Unpickler")
CHECKED_CALLS = ("importlib.import_module", "torch.load", "yaml.load")
"""May be called, with some arguments, and may not be given another name."""
MODULES = frozenset({"builtins", "importlib", "pickle", "torch", "yaml"})
"""Modules whose attributes decide what is run: as a value (an argument, a default, an element) a module could get another name."""
USUAL_NAMES = {"np": "numpy", "pd": "pandas", **{name: f"builtins.{name}" for name in ("__import__", "compile", "eval", "exec")}}


def problems(source: str, path: str = "a.py") -> list[str]:
    """Lines that can run what is in a file."""
    return list(_Search(ast.parse(source), path).problems())


def _is_below(name: str, prefixes: frozenset[str]) -> bool:
    return any(beginning in prefixes for beginning in accumulate(name.split("."), "{}.{}".format))


class _Search:
    """One source, whose names are resolved to full ones: ``p.load`` after ``import pickle as p`` is ``pickle.load``."""

    def __init__(self, tree: ast.Module, path: str) -> None:
        self._nodes, self._path = list(ast.walk(tree)), path
        self._full_names: defaultdict[str, set[str]] = defaultdict(set)
        """What a name can stand for anywhere in the source: functions may use one name for different things."""
        for name, full_name in USUAL_NAMES.items():
            self._full_names[name].add(full_name)
        for node in self._nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._add_import(node)
        self._add_assignments()
        self._safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
        for node in self._nodes:
            if isinstance(node, ast.ClassDef) and node.bases and all(self._names(base) & self._safe_loaders for base in node.bases):
                self._safe_loaders.add(node.name)

    def _add_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                self._full_names[alias.asname or alias.name].add(f"{node.module}.{alias.name}")
            elif alias.asname:
                self._full_names[alias.asname].add(alias.name)

    def _add_assignments(self) -> None:
        """Follow ``t = torch``, also through several names."""
        assignments = [
            (target.id, node.value)
            for node in self._nodes
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and isinstance(node.value, (ast.Name, ast.Attribute))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        ]
        for _ in range(3):
            for name, value in assignments:
                self._full_names[name] |= {full for full in self._names(value) if full.partition(".")[0] != name}

    def _names(self, node: ast.expr) -> set[str]:
        """The full names that an expression can stand for; empty for what is no chain of names."""
        if isinstance(node, ast.Name):
            return {node.id, *self._full_names.get(node.id, ())}
        if isinstance(node, ast.Attribute):
            return {f"{name}.{node.attr}" for name in self._names(node.value)}
        if isinstance(node, ast.Call) and self._is_getattr(node):
            attribute = ast.unparse(node.args[1])[1:-1]
            return {f"{name}.{attribute}" for name in self._names(node.args[0])}
        return set()

    def _is_getattr(self, call: ast.Call) -> bool:
        is_named = isinstance(call.func, ast.Name) and call.func.id == "getattr"
        return is_named and len(call.args) > 1 and isinstance(call.args[1], ast.Constant)

    def problems(self) -> Iterator[str]:
        inner = {id(node.value) for node in self._nodes if isinstance(node, ast.Attribute)}
        called = {id(node.func) for node in self._nodes if isinstance(node, ast.Call)}
        for node in self._nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found = self._of_import(node)
            elif isinstance(node, ast.ClassDef):
                found = self._of_class(node)
            elif isinstance(node, ast.Call):
                found = [*self._of_call(node), *self._of_names(self._names(node) - MODULES, is_called=False)]
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load) and id(node) not in inner:
                found = self._of_names(self._names(node), is_called=id(node) in called)
            else:
                continue
            yield from (f"{self._path}:{node.lineno}: {problem}" for problem in found)

    def _of_import(self, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
            yield from (f"imports {name}, which hides what is imported" for name in names if name.endswith("*"))
        # Uses of the module itself are found at their places.
        yield from (f"imports {name}" for name in names if name != "pickle" and self._is_forbidden(name))

    def _of_class(self, node: ast.ClassDef) -> Iterator[str]:
        if self._path != CLOSED_LIST:
            yield from (f"an unpickler: {node.name}" for base in node.bases if "Unpickler" in ast.unparse(base))

    def _of_names(self, names: set[str], *, is_called: bool) -> Iterator[str]:
        if self._path not in MODULE_AS_VALUE:
            yield from (f"uses the module {name} as a value" for name in sorted(names & MODULES))
        yield from (f"uses {name}" for name in sorted(names) if self._is_forbidden(name))
        if not is_called:
            yield from (f"gives {name} another name" for name in sorted(names) if name in CHECKED_CALLS)

    def _is_forbidden(self, name: str) -> bool:
        if self._path == CLOSED_LIST and name.startswith("pickle."):
            return name in ("pickle.load", "pickle.loads")
        if self._path in RUNS_MODULES and name in ("runpy", "runpy.run_module"):
            return False
        return _is_below(name, _FORBIDDEN) and not _is_below(name, _ALLOWED)

    def _of_call(self, call: ast.Call) -> Iterator[str]:
        names, keywords = self._names(call.func), {word.arg: word.value for word in call.keywords}
        texts = {name: ast.unparse(value) for name, value in keywords.items()}
        if names & {*UNPICKLERS}:
            yield "makes an unpickler"
        if "torch.load" in names and texts.get("weights_only") != "True":
            yield "calls torch.load without weights_only=True"
        if "yaml.load" in names and not ("Loader" in keywords and self._names(keywords["Loader"]) & self._safe_loaders):
            yield "calls yaml.load without a SafeLoader"
        if "importlib.import_module" in names:
            yield from self._of_import_module(call)
        if "numpy.load" in names and len(call.args) > 2:
            yield "calls numpy.load with more than a file and a mode"
        for word in ("allow_pickle", "trust_remote_code", "shell"):
            if texts.get(word, "False") != "False":
                yield f"passes {word}={texts[word]}"

    def _of_import_module(self, call: ast.Call) -> Iterator[str]:
        name = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
        if not isinstance(name, str):
            if self._path not in IMPORTS_BY_NAME:
                yield "imports a module whose name is not a constant"
        elif self._is_forbidden(name):
            yield f"imports {name}"


SOURCES = {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def test_no_source_runs_what_is_in_a_file():
    assert len(SOURCES) > 200
    assert [problem for name, path in SOURCES.items() for problem in problems(path.read_text(encoding="utf-8"), name)] == []


def test_every_exception_is_still_needed():
    for name in (CLOSED_LIST, *IMPORTS_BY_NAME, *RUNS_MODULES):
        assert problems(SOURCES[name].read_text(encoding="utf-8")), name


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, **options)",
        "from torch import load\nload(p, weights_only=False)",
        "import torch as t\nt.load(p)",
        "torch.serialization.load(p)",
        "f = torch.load\nf(p)",
        "t = torch\nu = t\nu.load(p)",
        "t: Any = torch\nt.load(p)",
        "if (t := torch): t.load(p)",
        "read(torch.load)",
        "getattr(torch, 'load')(p)",
        "getattr(torch, name)(p)",
        "vars(torch)['load'](p)",
        "def f(t=torch): t.load(p)",
        "self.t = torch\nself.t.load(p)",
        "for t in (torch,): t.load(p)",
        "t, u = torch, 1",
        "t = torch if x else None",
        "t = x or torch",
        "torch.storage._load_from_bytes(b)",
        "operator.methodcaller('load', p)(x)",
        "import timeit\ntimeit.timeit(t)",
        "import zipimport",
        "import torch.distributed.checkpoint as dcp\ndcp.load(s)",
        "from torch.distributed import checkpoint\ncheckpoint.load(s)",
        "from torch.distributed.checkpoint import load",
        "from torch.distributed.checkpoint import FileSystemReader",
        "torch.hub.load(p)",
        "import torch.hub",
        "from megatron.core import dist_checkpointing",
        "from megatron import core\ncore.dist_checkpointing.load(s, p)",
        "import megatron.core.dist_checkpointing.mapping\nmegatron.core.dist_checkpointing.load(s, p)",
        "from megatron.core.dist_checkpointing.serialization import load",
        "from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy",
        "pickle.load(file)",
        "from pickle import load",
        "from pickle import *",
        "import pickle as p\np.load(f)",
        "import json as p\ndef read(f):\n    import pickle as p\n    p.load(f)",
        "_pickle.loads(b)",
        "import _pickle",
        "read(pickle)",
        "class Reader(pickle.Unpickler): pass",
        "from io import Unpickler\nclass Reader(Unpickler): pass",
        "pickle._Unpickler(f).load()",
        "import joblib",
        "pd.read_pickle(p)",
        "from pandas import read_pickle",
        "np.load(path, allow_pickle=True)",
        "np.load(path, None, True)",
        "import numpy\nnumpy.lib.format.read_array(f)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, Loader=yaml.SafeLoader if safe else other)",
        "from yaml import load, Loader",
        "from yaml import load\nload(t, Loader=L)",
        "from yaml import unsafe_load",
        "yaml.unsafe_load_all(t)",
        "class _Loader(yaml.Loader): pass\nyaml.load(text, Loader=_Loader)",
        "class _Loader(yaml.SafeLoader, yaml.Loader): pass\nyaml.load(text, Loader=_Loader)",
        "eval(text)",
        "builtins.eval(t)",
        "from builtins import eval as e\ne(t)",
        "f = exec",
        "runpy.run_path(t)",
        "from runpy import run_path",
        "subprocess.getoutput(t)",
        "subprocess.run(command, shell=True)",
        "import subprocess as s\ns.getstatusoutput(t)",
        "from os import system",
        "import os as o\no.popen(t)",
        "importlib.import_module(name)",
        "from importlib import import_module\nimport_module(name)",
        "from importlib import import_module as i\nf = i",
        "importlib.import_module('pickle5' if old else 'pickle')",
        "importlib.import_module('marshal')",
        "importlib.util.spec_from_file_location(name, p)",
        "__import__(name)",
        "from hydra.utils import instantiate",
        "hydra.utils.instantiate(config)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_search_finds(source):
    assert problems(source), source


@pytest.mark.parametrize(
    "source",
    [
        "class _Loader(yaml.SafeLoader): pass\nyaml.load(text, Loader=_Loader)",
        "from yaml import SafeLoader, load\nload(text, Loader=SafeLoader)",
        "import torch as t\nt.load(file, weights_only=True)",
        "model.eval()\nre.compile(pattern)\ntorch.compile(model)",
        "import pickle\nraise pickle.UnpicklingError",
        "from torch.distributed.checkpoint import CheckpointException",
        "from megatron.core.dist_checkpointing.mapping import ShardedTensor",
        "importlib.import_module('json')",
        "subprocess.run(command, shell=False)",
        "np.load(path, mmap_mode='r')",
    ],
)
def test_the_search_lets_pass(source):
    assert problems(source) == []


@pytest.mark.parametrize(
    "source", ["pickle.load(file)", "pickle.loads(text)", "pickle.Unpickler(file).load()", "pickle._Unpickler(file).load()"]
)
def test_the_file_with_the_closed_list_only_derives_an_unpickler(source):
    assert problems(source, CLOSED_LIST)
    assert problems("import pickle\nclass _Reader(pickle._Unpickler): pass\n_Reader(file).load()", CLOSED_LIST) == []
