"""Rules of the repository that a reader relies on and that no linter checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from w1train.cli import DATA_VERBS, VERBS
from w1train.runtime.version import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_FOLDER_SHARE = 0.10

# The packages of w1train/, lowest first: each may import from the packages before it in this list, and from itself.
PACKAGES = (
    "config",
    "runtime",
    "data",
    "diffusion",
    "kernels",
    "attention",
    "model",
    "objectives",
    "engine",
    "sampling",
    "profiling",
    "planning",
    "diagnosis",
    "checkpoints",
    "inference",
    "conversion",
    "preflight",
    "records",
    "reports",
    "training",
    "evaluation",
)
LAYERS = {package: layer for layer, package in enumerate(PACKAGES)}
COMMANDS = max(LAYERS.values()) + 1
BUILT_ON_THE_LIBRARY = ("data_tools", "launch", "recipes", "benchmarks", "tests")


def tracked_files() -> list[Path]:
    """Every file in git, or new and not ignored: a rule holds before the commit too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [path for name in listing.split("\0") if name and (path := REPOSITORY / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py" and (not folders or path.relative_to(REPOSITORY).parts[0] in folders)]


@cache
def imported_modules(path: Path) -> tuple[tuple[int, str], ...]:
    """Return (line, absolute module name) of each import, also of those inside functions. Several tests ask for it."""
    return tuple(_imported_modules(path))


def _imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    package = path.relative_to(REPOSITORY).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from w1train import training` names the package only in the alias.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def package_in_w1train(module: str) -> str | None:
    """`training` for `w1train.training.loop`; the command itself for `w1train.pretrain`; None for what is not w1train's."""
    parts = module.split(".")
    return parts[1] if parts[0] == "w1train" and len(parts) > 1 else None


def direction_problems(path: Path) -> Iterator[str]:
    """What a module inside a package of w1train imports from above it."""
    own = path.relative_to(REPOSITORY / "w1train").parts[0]
    if own not in LAYERS:
        yield f"w1train/{own} has no place in LAYERS of this test: give it one"
        return
    for line, module in imported_modules(path):
        target = package_in_w1train(module)
        above = target is not None and target not in (own, "__version__") and LAYERS.get(target, COMMANDS) > LAYERS[own]
        if above or module.split(".")[0] in BUILT_ON_THE_LIBRARY:
            yield f"{path.relative_to(REPOSITORY)}:{line} imports {module}, which is above w1train/{own}"


def package_modules() -> list[Path]:
    """Modules inside w1train's packages. Those directly in w1train/ are commands: they may import all of it."""
    return [path for path in python_files("w1train") if path.parent != REPOSITORY / "w1train"]


def test_imports_go_one_way():
    problems = [problem for path in package_modules() for problem in direction_problems(path)]
    assert not problems, "\n".join(problems)


def test_packages_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path in package_modules():
        own = path.relative_to(REPOSITORY / "w1train").parts[0]
        targets = {package_in_w1train(module) for _, module in imported_modules(path)} & LAYERS.keys()
        graph.setdefault(own, set()).update(targets - {own})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"packages import each other: {' <- '.join(error.args[1])}")


def executed_imports(tree: ast.Module) -> Iterator[str]:
    """Return what a module imports while it is imported: not what is imported inside functions, or for type checkers alone.

    Of ``from package import name``, both ``package`` and ``package.name``: the name may be a module's.
    """
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        else:
            waiting += ast.iter_child_nodes(node)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_circle(sources: dict[str, str]) -> list[str] | None:
    """Return the modules of a circle of imports, or None.

    Args:
        sources: text of each module by its name. A package's is empty: what its modules import from it are other modules.
    """
    graph = {name: {*executed_imports(ast.parse(text))} & sources.keys() - {name} for name, text in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_modules_import_each_other_in_a_circle():
    """In no order: which of them can be imported first would depend on who imports it."""
    paths = python_files("w1train", "data_tools", "launch", "benchmarks")
    circle = import_circle({module_name(path): path.read_text(encoding="utf-8") for path in paths})
    assert circle is None, " <- ".join(circle or [])


@pytest.mark.parametrize(
    ("importing", "is_circle"),
    [
        ("import p.a", True),
        ("from p import a", True),
        ("from p.a import name", True),
        ("if condition:\n    import p.a", True),
        ("class C:\n    import p.a", True),
        ("def f():\n    import p.a", False),
        ("if TYPE_CHECKING:\n    import p.a", False),
        ("from p import c", False),
        ("import p.b", False),
    ],
)
def test_what_is_a_circle(importing, is_circle):
    sources = {"p": "", "p.a": "from p.b import x", "p.b": importing, "p.c": ""}
    assert (import_circle(sources) is not None) == is_circle


@pytest.mark.parametrize(
    ("location", "source", "problem"),
    [
        ("w1train/data/a.py", "from w1train.config.schema import Config\nfrom w1train import __version__\n", None),
        ("w1train/training/a.py", "from w1train.sampling import denoise\n", None),
        ("w1train/data/a.py", "def f():\n    from w1train.training.loop import train\n", "a.py:2 imports w1train.training.loop.train"),
        ("w1train/data/a.py", "from w1train import model\n", "a.py:1 imports w1train.model"),
        ("w1train/data/a.py", "from ..model import block\n", "a.py:1 imports w1train.model.block"),
        ("w1train/model/a.py", "import w1train.pretrain\n", "a.py:1 imports w1train.pretrain"),
        ("w1train/model/a.py", "import data_tools.tokenize\n", "a.py:1 imports data_tools.tokenize"),
        ("w1train/novel/a.py", "", "w1train/novel has no place"),
    ],
)
def test_the_import_rule_sees_what_it_should(tmp_path, monkeypatch, location, source, problem):
    monkeypatch.setattr(f"{__name__}.REPOSITORY", tmp_path)
    path = tmp_path / location
    path.parent.mkdir(parents=True)
    path.write_text(source)
    problems = list(direction_problems(path))
    assert (problems == []) if problem is None else (len(problems) == 1 and problem in problems[0])


# The parts of megatron-core that each folder of w1train/ may import. Every folder may also read parallel_state, and engine/ may import all
# parts: builders, optimizers, data-parallel wrappers and pipeline schedules are used there alone.
MEGATRON_PARTS = {
    "model": (
        *("dist_checkpointing.mapping", "enums", "extensions", "models"),
        *("process_groups_config", "tensor_parallel", "transformer", "utils"),
    ),
    "attention": ("tensor_parallel", "transformer"),
    "checkpoints": ("dist_checkpointing",),
    "inference": ("tensor_parallel",),
}
# Exceptions. megatron_on_cpu.py redirects megatron-core to the CPU before anything is built: it imports the package ("") and what it
# replaces. distributed.py makes the process groups, and seeds the random numbers of each rank with them.
MEGATRON_EXCEPTIONS = {
    "w1train/runtime/megatron_on_cpu.py": ("", "distributed.param_and_grad_buffer", "models", "optimizer", "transformer.moe"),
    "w1train/runtime/distributed.py": ("tensor_parallel.model_parallel_cuda_manual_seed",),
}


def megatron_problems(path: Path) -> Iterator[str]:
    """Yield the imports by which a module of w1train reaches parts of megatron-core that its folder may not use."""
    name = path.relative_to(REPOSITORY).as_posix()
    folder = name.split("/")[1]
    if folder == "engine":
        return
    allowed = (*MEGATRON_PARTS.get(folder, ()), *MEGATRON_EXCEPTIONS.get(name, ()), "parallel_state")
    for line, module in imported_modules(path):
        part = module.removeprefix("megatron.core").removeprefix(".")
        if module.startswith("megatron") and not any(part == each or (each and part.startswith(f"{each}.")) for each in allowed):
            yield f"{name}:{line} imports {module}"


def test_megatron_is_built_and_hooked_in_one_room():
    problems = [problem for path in python_files("w1train") for problem in megatron_problems(path)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("location", "source", "found"),
    [
        ("w1train/training/a.py", "from megatron.core import parallel_state\n", False),
        ("w1train/training/a.py", "from megatron.core.parallel_state import RankGenerator\n", False),
        ("w1train/training/a.py", "from megatron.core.pipeline_parallel import get_forward_backward_func\n", True),
        ("w1train/model/a.py", "from megatron.core.transformer.mlp import MLP\n", False),
        ("w1train/model/a.py", "def f():\n    import megatron.core.optimizer\n", True),
        ("w1train/model/a.py", "import megatron.core\n", True),
        ("w1train/checkpoints/a.py", "from megatron.core import distributed\n", True),
        ("w1train/engine/a.py", "from megatron.core.optimizer import distrib_optimizer\n", False),
        ("w1train/a.py", "from megatron.core import tensor_parallel\n", True),
    ],
)
def test_the_rule_about_megatron_sees_what_it_should(tmp_path, monkeypatch, location, source, found):
    monkeypatch.setattr(f"{__name__}.REPOSITORY", tmp_path)
    path = tmp_path / location
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert bool(list(megatron_problems(path))) is found


def test_files_are_short():
    sources = [path for path in tracked_files() if path.suffix in (".py", ".sh")]
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in sources}
    assert lengths
    assert {name: length for name, length in lengths.items() if length >= MAX_FILE_LINES} == {}


def folder_lines() -> Counter[str]:
    """Return the lines of Python directly in each folder of w1train/."""
    lines: Counter[str] = Counter()
    for path in python_files("w1train"):
        lines[str(path.parent.relative_to(REPOSITORY))] += len(path.read_text(encoding="utf-8").splitlines())
    return lines


def test_no_folder_is_too_large():
    """A folder with a tenth of all lines has several subjects: each of them is a folder."""
    lines = folder_lines()
    too_large = {folder: f"{count / lines.total():.1%}" for folder, count in lines.items() if count > MAX_FOLDER_SHARE * lines.total()}
    assert too_large == {}


_SAME_MEANING = {
    "rotary": "the rotary position embedding: model/ has its angles, kernels/ what applies them",
    "status": "status.json of a run: runtime/ writes and reads it, the command prints it",
    # A benchmark has the name of what it measures: benchmarks/data/tokenize.py is the command that measures data_tools/tokenize.py.
    "corruption": "data/ has the corruption of a batch, benchmarks/data/ the command that measures it",
    "loader": "data/ has the loader, benchmarks/data/ the command that measures it",
    "tokenize": "data_tools/ has the command, benchmarks/data/ the command that measures it",
}
"""File names that several modules have, and what they all are about."""


def test_a_file_name_means_one_thing():
    """Two files of one name are taken for each other in editors, tracebacks and conversations."""
    paths = [path for path in python_files("w1train", "data_tools", "benchmarks") if not path.stem.startswith("__")]
    counts = Counter(path.stem for path in paths)
    shared = {name: [str(path.relative_to(REPOSITORY)) for path in paths if path.stem == name] for name in counts if counts[name] > 1}
    assert {name: places for name, places in shared.items() if name not in _SAME_MEANING} == {}
    assert _SAME_MEANING.keys() <= shared.keys(), "an exception that is needed no more"


def test_functions_are_short():
    too_long = {}
    for path in python_files("w1train", "data_tools", "launch", "benchmarks", "docs"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long[f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}"] = length
    assert too_long == {}


def test_every_folder_with_modules_is_a_package():
    """A folder without __init__.py is left out of the installed package, and its tests may shadow others of the same name."""
    folders = {path.parent for path in python_files() if path.parent != REPOSITORY}
    missing = [str(folder.relative_to(REPOSITORY)) for folder in folders if not (folder / "__init__.py").is_file()]
    assert missing == []


def test_nothing_built_is_tracked():
    built = [path for path in tracked_files() if "__pycache__" in path.parts or path.suffix in (".pyc", ".so", ".bin", ".idx")]
    assert built == []


TOP_LEVEL = [
    ".ci",
    ".dockerignore",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "data_tools",
    "docker",
    "docs",
    "launch",
    "mkdocs.yml",
    "pyproject.toml",
    "recipes",
    "tests",
    "w1train",
]


def test_nothing_lies_at_the_top_by_accident():
    # A command that took --help as the name of its output wrote a file of this name, and the file was committed.
    assert sorted({path.relative_to(REPOSITORY).parts[0] for path in tracked_files()} - set(TOP_LEVEL)) == []


def test_the_version_is_the_one_that_is_declared():
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_licence_is_the_one_that_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0 AND MIT"
    assert {REPOSITORY / name for name in project["license-files"]} == {path for path in tracked_files() if path.name == "LICENSE"}
    licence = (REPOSITORY / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


@pytest.fixture(scope="module")
def requirements() -> dict[str, list[str]]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def test_forbidden_dependencies(requirements):
    """Two names that look like NVIDIA's and are not: `apex` is a web toolkit, `nvidia-dali` a placeholder."""
    names = {Requirement(text).name.lower().replace("_", "-") for group in requirements.values() for text in group}
    assert names.isdisjoint({"apex", "nvidia-apex", "nvidia-dali", "nvidia-resiliency-ext"})
    assert "nvidia-dali-cuda130" in names


def test_the_environment_meets_the_declared_ranges(requirements):
    wrong = []
    for text in requirements[""] + requirements["dev"]:
        requirement = Requirement(text)
        installed = metadata.version(requirement.name)
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{text}: {installed} is installed")
    assert wrong == []


def test_imports_are_declared(requirements):
    """Each top-level module that the library imports comes from the standard library, this project or a declared dependency."""
    provided = {"w1train", "data_tools", "launch", "recipes", *sys.stdlib_module_names}
    declared = {Requirement(text).name.lower().replace("_", "-") for group in requirements.values() for text in group}
    for module, distributions in metadata.packages_distributions().items():
        if declared & {name.lower().replace("_", "-") for name in distributions}:
            provided.add(module)
    # Namespace packages, what a dependency brings and promises (omegaconf: hydra-core, triton: torch), and extras not installed here.
    provided |= {"megatron", "omegaconf", "triton", "transformer_engine", "cudnn", "cutlass", "nvidia"}
    provided |= {"transformers", "safetensors", "pyarrow"}
    undeclared = {
        f"{path.relative_to(REPOSITORY)}:{line} {module}"
        for path in python_files("w1train", "data_tools", "launch")
        for line, module in imported_modules(path)
        if module.split(".")[0] not in provided
    }
    assert undeclared == set()


_WITH_A_LOCALE = ("open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TextIOWrapper")
_BINARY = re.compile(r"[rwxa]?\+?b\+?|[rwxa]b\+?")


def _names_no_encoding(call: ast.Call) -> bool:
    """Tell whether a call opens a file as text, or gives a program's output as text, in an encoding that depends on the locale."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    if (
        "encoding" in options
        or None in options
        or (isinstance(function, ast.Attribute) and _module(function.value) in ("os", "TokenDataset", "archive"))
    ):
        return False
    if name in ("run", "Popen", "check_output"):
        return "text" in options
    # w1train.runtime.files.write_text writes UTF-8.
    if name not in _WITH_A_LOCALE or (name == "write_text" and isinstance(function, ast.Name)):
        return False
    values = [node for argument in [*call.args, *options.values()] for node in ast.walk(argument)]
    words = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return not any(_BINARY.fullmatch(word) for word in words) and not (name == "open" and "opener" in options)


def _module(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def test_no_file_is_text_of_the_locale():
    """Under LC_ALL=C what another machine wrote could not be read, and what is read back would be something else."""
    found = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in python_files("w1train", "data_tools", "launch")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _names_no_encoding(node)
    ]
    assert not found, found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("p.open('a+')", True),
        ("p.read_text()", True),
        ("subprocess.run(c, text=True)", True),
        ("open(p, 'rb')", False),
        ("open(p, mode='x+b')", False),
        ("p.open('w', encoding='utf-8')", False),
        ("write_text(p, text)", False),
        ("os.open(p, flags)", False),
    ],
)
def test_what_is_text_of_the_locale(code, expected):
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert _names_no_encoding(call) is expected


_ALONE = ("launch.needed_packages", "w1train.config.schema_reference")
"""Run while an image is built, without w1train; and by those who change the configuration, to write its documentation."""


def test_every_command_is_prepared_for_poor_environments():
    """w1train.runtime.command.command around every main, with what the user types: a verb, or a module."""
    typed = {verb.module: f"w1train {name}" for name, verb in VERBS.items()}
    typed |= {verb.module: f"w1train data {name}" for name, verb in DATA_VERBS.items()}
    for path in python_files("w1train", "data_tools", "launch"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        if '__name__ == "__main__"' not in path.read_text(encoding="utf-8") or name in _ALONE:
            continue
        (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        program = "PROGRAM" if name in ("w1train.launcher", "w1train.pretrain") else repr(typed.get(name, name))
        assert [ast.unparse(decorator) for decorator in main.decorator_list] == [f"command({program})"], name
