"""Every command in the documentation works: make targets exist, options parse, recipes and overrides compose.

Commands that change nothing (--cfg job, --list, --help) are really run. One that this file does not know how to check fails: teach
it here, or leave the command out.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from launch.slurm_arguments import parse as parse_slurm
from w1train.cli import DATA_VERBS, VERBS
from w1train.config.argument_parser import ArgumentParser
from w1train.config.command_line import CommandLine, parse_command_line
from w1train.config.compose import load_config
from w1train.config.errors import ConfigurationError
from w1train.config.rules.validate import validate
from w1train.launcher import COUNTS
from w1train.planning.arguments import parse as parse_plan
from w1train.registered_names import NAME_RULES

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONFIGURED = {"w1train.pretrain", "w1train.launcher"}
"""Modules whose command line is recipes and overrides; all others use argparse."""
DISTRIBUTED = {"w1train.doctor"}
"""Modules with argparse that torchrun may start."""
RECIPES_OF_EXAMPLES = {"mine", "NAME"}


class CommandError(Exception):
    """A documented command that does not work, or that nothing here can check."""


def shell_commands(text: str) -> Iterator[str]:
    """The commands of every fenced bash block, continued lines joined, comments dropped."""
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield " ".join(line.split())


def check(command: str) -> None:
    """Raise CommandError unless the command would work when typed in the repository."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = [recipes_of_readme().name if word == "my_recipes" else word for word in lexer]
    if operators := [word for word in words if set(word) <= set("();<>|&")]:
        raise CommandError(f"don't know how to check {operators[0]!r} in: {command}")
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    folder, _, program = words[0].rpartition("/")
    if program not in PROGRAMS or folder not in (("launch",) if program.endswith(".sh") else ("", ".venv/bin")):
        raise CommandError(f"don't know how to check: {command}")
    PROGRAMS[program](words[1:])


@cache
def recipes_of_readme() -> tempfile.TemporaryDirectory:
    """A directory of own recipes with the whole recipe that README.md shows. It is removed when this process ends."""
    directory = tempfile.TemporaryDirectory()
    (Path(directory.name) / "recipe").mkdir()
    (Path(directory.name) / "recipe" / "mine.yaml").write_text(recipe_of(REPOSITORY / "README.md"))
    return directory


def recipe_of(page: Path) -> str:
    (recipe,) = re.findall(r"^```yaml\n(# @package _global_\n.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return recipe


def check_source(words: list[str]) -> None:
    if words != [".venv/bin/activate"]:
        raise CommandError(f"don't know how to check: source {' '.join(words)}")


def check_make(words: list[str]) -> None:
    variables = set(re.findall(r"^([A-Z]+) \?=", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)) | {"PYTHON", "EXTRAS"}
    given = {word.partition("=")[0] for word in words if "=" in word}
    if unknown := given - variables:
        raise CommandError(f"the Makefile has no variable {', '.join(unknown)}")
    run("make", "--dry-run", *words)


def check_python(words: list[str]) -> None:
    if words[:1] != ["-m"] or len(words) < 2:
        raise CommandError(f"don't know how to check: python {' '.join(words)}")
    module, arguments = words[1], words[2:]
    path = module_path(module)
    if module == "w1train.launcher":
        check_train(arguments)
    elif module in CONFIGURED:
        if compose(arguments).action != "run" and not run(sys.executable, "-m", module, *arguments).strip():
            raise CommandError(f"prints nothing: {module} {' '.join(arguments)}")
    elif module == "w1train.plan":
        check_plan(arguments)
    elif module == "launch.slurm" and not {"-h", "--help"} & set(arguments):
        check_slurm(arguments)
    elif {"-h", "--help"} & set(arguments):
        run(sys.executable, "-m", module, *arguments)
    elif "ArgumentParser" in path.read_text():
        if (end := parse_only(module, arguments)).strip() != "parsed":
            raise CommandError(f"{module} {' '.join(arguments)}: {end}")
    else:
        raise CommandError(f"don't know how to check the arguments of {module}")


def check_w1train(words: list[str]) -> None:
    """A verb and its arguments, or the list of verbs."""
    if words[:1] == ["data"]:
        verbs, words = DATA_VERBS, words[1:]
    else:
        verbs = VERBS
    if not words:
        return
    if words[0] not in verbs:
        raise CommandError(f"w1train has no verb {words[0]}")
    check_python(["-m", verbs[words[0]].module, *words[1:]])


def check_train(arguments: list[str]) -> None:
    """Composed, and its layout fitted to its ranks."""
    try:
        command_line = parse_command_line(arguments, NAME_RULES, COUNTS)
    except ConfigurationError as error:
        raise CommandError(str(error)) from error
    config, num_ranks = command_line.config, command_line.counts.get("--nproc", 1)
    if config is not None and command_line.action == "run" and num_ranks > 1 and (problems := validate(config, num_ranks)):
        raise CommandError(str(ConfigurationError(problems)))


def parse_only(module: str, arguments: list[str]) -> str:
    """What the module prints when its own argparse runs and nothing after it, which ends with "parsed" alone if nothing was wrong.

    In a fork, so that what all these modules import takes its seconds once, here.
    """
    from w1train.runtime.megatron_on_cpu import import_megatron

    import_megatron()
    importlib.import_module("w1train.training.loop")
    with tempfile.TemporaryFile() as output:
        process = multiprocessing.get_context("fork").Process(target=_parse_and_stop, args=(module, arguments, output.fileno()))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
        output.seek(0)
        return output.read().decode() or f"ended without a word, with {process.exitcode}"


def _parse_and_stop(module: str, arguments: list[str], output: int) -> None:
    parse_args = ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        sys.exit("parsed")

    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 (pytest has put its own there)
    os.chdir(REPOSITORY)
    ArgumentParser.parse_args = parse_and_stop
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # runpy warns of one that is imported already
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def check_plan(arguments: list[str]) -> None:
    """Read as the planner reads it, its layout fitted to the GPUs; planning itself is tested in tests/planning."""
    try:
        request = parse_plan(arguments)
    except ConfigurationError as error:
        raise CommandError(str(error)) from error
    if not request.search and (problems := validate(request.config, request.num_gpus)):
        raise CommandError(str(ConfigurationError(problems)))


def check_slurm(words: list[str]) -> None:
    """Read as launch.slurm reads it; what it then does is tested in tests/launch."""
    try:
        parse_slurm(words, REPOSITORY)
    except ConfigurationError as error:
        raise CommandError(str(error)) from error


def check_torchrun_script(words: list[str]) -> None:
    """launch/torchrun.sh's own word, and then what w1train.pretrain takes."""
    compose([word for word in words if not word.startswith("--nsys")])


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser, parse_min_max_nnodes

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options = get_args_parser().parse_args(words)
    except SystemExit:
        raise CommandError(f"torchrun: {complaint.getvalue().strip()}") from None
    if options.module and options.training_script in DISTRIBUTED:
        check_python(["-m", options.training_script, *options.training_script_args])
        return
    if not options.module or options.training_script not in CONFIGURED:
        raise CommandError(f"don't know how to check what torchrun starts: {options.training_script}")
    module_path(options.training_script)
    config = compose(options.training_script_args).config
    assert config is not None, "flags that only print do not belong under torchrun"
    num_nodes = parse_min_max_nnodes(options.nnodes)[1]
    if problems := validate(config, world_size=num_nodes * int(options.nproc_per_node)):
        raise CommandError(str(ConfigurationError(problems)))


def check_docker(words: list[str]) -> None:
    """`docker run --OPTION=VALUE... IMAGE COMMAND`: the command, which runs in the image; without one, the image's own does."""
    if words[:1] != ["run"]:
        raise CommandError(f"don't know how to check: docker {' '.join(words)}")
    _, *command = without_options(words[1:])
    if command:
        check(shlex.join(command))


def check_srun(words: list[str]) -> None:
    check(shlex.join(without_options(words)))


def without_options(words: list[str]) -> list[str]:
    """From the first word that is no option; options have their values after `=`."""
    return list(itertools.dropwhile(lambda word: word.startswith("-"), words))


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "python": check_python,
    "w1train": check_w1train,
    "torchrun": check_torchrun,
    "docker": check_docker,
    "srun": check_srun,
    "slurm.sh": check_slurm,
    "torchrun.sh": check_torchrun_script,
    "source": check_source,
}


def module_path(module: str) -> Path:
    place = REPOSITORY.joinpath(*module.split("."))
    path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    if not path.is_file():
        raise CommandError(f"no module {module} in this repository")
    return path


def compose(arguments: list[str]) -> CommandLine:
    try:
        return parse_command_line(arguments)
    except ConfigurationError as error:
        raise CommandError(str(error)) from error


def run(*command: str, status: int = 0) -> str:
    """What the command prints, on either stream."""
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    if result.returncode != status:
        raise CommandError(f"{' '.join(command[:4])} ended with {result.returncode}: {result.stdout.strip()}")
    return result.stdout


DOCUMENTED = sorted({(page.name, command) for page in PAGES for command in shell_commands(page.read_text())})


@pytest.mark.parametrize(("page", "command"), DOCUMENTED, ids=lambda value: value)
def test_documented_command(page, command):
    check(command)


def test_the_two_commands_come_first():
    assert list(shell_commands((REPOSITORY / "README.md").read_text()))[:2] == ["make demo", "make test"]


def test_readme_is_short_and_its_pictures_are_small():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    pictures = [REPOSITORY / path for path in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)]
    assert len(pictures) == 2
    assert 0 < sum(picture.stat().st_size for picture in pictures) < 400_000


def test_the_recipe_of_readme_is_short_and_the_same_in_docs():
    recipe = recipe_of(REPOSITORY / "README.md")
    assert len(recipe.splitlines()) <= 15
    assert recipe_of(REPOSITORY / "docs" / "own_recipe.md") == recipe


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("frobnicate --now", "don't know how to check: frobnicate"),
        ("/usr/bin/make test", "don't know how to check"),
        ("make nonesuch", "nonesuch"),
        ("make demo CORPORA=x", "no variable CORPORA"),
        ("source ~/.bashrc", "don't know how to check: source"),
        ("make test && rm -rf runs", "don't know how to check '&&'"),
        ("make test > log", "don't know how to check '>'"),
        ("python setup.py install", "don't know how to check: python setup.py"),
        ("python -m w1train.nonesuch", "no module w1train.nonesuch"),
        ("python -m pytest", "no module pytest in this repository"),
        ("python -m w1train.config.schema x", "don't know how to check the arguments of w1train.config.schema"),
        ("python -m data_tools.train_tokenizer --input a --output b --vocab-size 300 --nonesuch", "unrecognized arguments: --nonesuch"),
        ("python -m data_tools.train_tokenizer --output b", "--input"),
        ("python -m w1train.pretrain recipe=demo model.hiden_size=3", "hidden_size"),
        ("w1train train recipe=demo model.hiden_size=3", "hidden_size"),
        ("w1train train --nproc 3 recipe=demo", "data-parallel ranks"),
        ("w1train nonesuch runs/demo", "w1train has no verb nonesuch"),
        ("w1train data sample runs/demo", "w1train has no verb sample"),
        ("w1train sample runs/demo --step 3", "--step: --checkpoint STEP chooses a checkpoint"),
        ("torchrun --ranks 2 -m w1train.pretrain recipe=demo", "torchrun: "),
        ("torchrun --standalone --nproc-per-node 2 -m w1train.pretrain recipe=nonesuch", "nonesuch"),
        ("torchrun --standalone --nproc-per-node 2 -m data_tools.tokenize", "don't know how to check what torchrun starts"),
        ("torchrun --standalone --nproc-per-node 4 -m w1train.pretrain recipe=demo parallel.pipeline=3", "in a world of 4"),
        ("torchrun --standalone --nproc-per-node 3 -m w1train.pretrain recipe=demo", "global_batch_size"),
        ("docker build .", "don't know how to check: docker build"),
        ("docker run --gpus=all image python -m w1train.doctor --nonesuch", "unrecognized arguments: --nonesuch"),
        ("srun --nodes=2 torchrun --standalone --nproc-per-node 2 -m w1train.pretrain recipe=nonesuch", "nonesuch"),
        ("python -m w1train.plan recipe=w1_4b gpus=many", "a whole number"),
        ("launch/slurm.sh --nodez 2 -- recipe=w1_4b", "did you mean --nodes"),
        ("python -m launch.slurm --nodes 3 -- recipe=w1_4b", "data-parallel ranks"),
        ("launch/torchrun.sh recipe=nonesuch", "nonesuch"),
        ("slurm.sh -- recipe=w1_4b", "don't know how to check"),
        ("python -m w1train.plan recipe=w1_4b gpus=10 parallel.tensor=4", "in a world of 10"),
    ],
)
def test_a_command_that_does_not_work_or_is_not_understood_fails(command, complaint):
    with pytest.raises(CommandError, match=complaint):
        check(command)


def test_shell_commands_are_found():
    text = "```bash\n# first\nmake \\\n  test\n\nmake lint  \n```\n```\nnot a command\n```\n```sh\nls\n```\n"
    assert list(shell_commands(text)) == ["make test", "make lint", "ls"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    missing = [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:w1train|recipes|launch|data_tools|tests|docs|benchmarks)/[\w./-]*)`", text)
    missing += [path for path in paths if not (REPOSITORY / path).exists()]
    assert missing == []


def test_recipes_that_are_named_compose():
    named = {name for page in PAGES for name in re.findall(r"recipe=(\w+)", page.read_text())} - RECIPES_OF_EXAMPLES
    assert {"w1_4b", "llada_8b"} <= named
    for name in sorted(named):
        load_config([f"recipe={name}"])
