"""The one command: its verbs, and `w1train train`, which starts ranks."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.slow import slow_except
from tests.test_project import REPOSITORY
from w1train import cli
from w1train import launcher as launcher_module
from w1train.cli import DATA_VERBS, VERBS
from w1train.config.rules.rule import Rule
from w1train.local_ranks import Outcome
from w1train.preflight import start_rules
from w1train.runtime.exit_status import ExitStatus

TORCH = {"torch", "megatron"}
HEAVY = {*TORCH, "numpy", "hydra", "rich", "transformers"}


def python(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, in a directory that is not the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(autouse=True)
def own_ctrl_c():
    """The command changes what Ctrl-C does in its process, which here is that of the tests."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_list_has_a_line_for_each_verb(capsys, words):
    assert cli.main(words) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == [*VERBS]
    assert cli.main(["data", *words]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == [*DATA_VERBS]


def test_the_list_fits_a_terminal(capsys):
    for words in ([], ["data"]):
        cli.main(words)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_list_and_a_mistake_need_no_heavy_import(tmp_path):
    """Either would take seconds otherwise."""
    code = f"import sys; from w1train.cli import main; main([]); main(['trian']); print({HEAVY} & set(sys.modules), file=sys.stderr)"
    assert python(code, tmp_path).stderr.endswith("set()\n")


def test_the_command_is_installed_and_every_verb_is_a_script():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"w1train": "w1train.cli:main"}
    for verb in (*VERBS.values(), *DATA_VERBS.values()):
        if verb.module:
            spec = find_spec(verb.module)
            assert spec is not None
            assert spec.origin is not None
            assert '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["trian"], "did you mean w1train train?"),
        (["Sample"], "did you mean w1train sample?"),
        (["pretrain"], "did you mean w1train train?"),
        (["export"], "did you mean w1train convert?"),
        (["generate"], "did you mean w1train sample?"),
        (["tokenize"], "did you mean w1train data tokenize?"),
        (["train-tokeniser"], "did you mean w1train data train-tokenizer?"),
        (["recipe=demo"], "did you mean w1train train recipe=demo?"),
        (["xyzzy"], "the verbs are train, sample, "),
        (["--frobnicate"], "the verbs are train, sample, "),
        (["data", "tokenise"], "did you mean w1train data tokenize?"),
    ],
)
def test_an_unknown_verb_says_what_was_meant(capsys, words, complaint):
    assert cli.main(words) == 2
    output = capsys.readouterr()
    assert complaint in output.err
    assert output.out == ""


@pytest.mark.parametrize(
    ("words", "module", "argv"),
    [
        (["sample", "runs/demo", "--json"], "w1train.sample", ["w1train sample", "runs/demo", "--json"]),
        (["data", "pack-report", "data/train"], "data_tools.pack_report", ["w1train data pack-report", "data/train"]),
    ],
)
def test_a_verb_runs_its_module(monkeypatch, words, module, argv):
    calls = []
    monkeypatch.setattr(sys, "argv", ["w1train", *words])
    monkeypatch.setattr(runpy, "run_module", lambda name, **options: calls.append((name, list(sys.argv), options["run_name"])))
    assert cli.main() == 0
    assert calls == [(module, argv, "__main__")]


@pytest.mark.parametrize(
    "words",
    slow_except(
        [["sample"], ["evaluate"]],
        [
            *(["sample"], ["evaluate"], ["average"], ["convert", "to-hf"], ["plan"]),
            *(["data", "verify"], ["data", "build-packing", "--sequence-length", "8"]),
        ],
    ),
)
def test_options_are_read_before_torch_is_imported(tmp_path, words):
    """Its import takes seconds, for which --help and a wrong option should not wait."""
    code = f"import atexit, sys; from w1train.cli import main; atexit.register(lambda: print({TORCH} & set(sys.modules))); main("
    asked, wrong = python(f"{code}{[*words, '--help']})", tmp_path), python(f"{code}{[*words, 'a', 'b', '--frobnicate']})", tmp_path)
    assert (asked.returncode, asked.stdout.endswith("\nset()\n")) == (0, True), asked.stderr
    assert (wrong.returncode, wrong.stdout) == (2, "set()\n"), wrong.stderr
    assert "frobnicate" in wrong.stderr


def test_the_exit_status_is_the_verbs_own(tmp_path, monkeypatch):
    """And python -m w1train is the same command."""
    command = [sys.executable, "-m", "w1train", "status", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2
    assert "not a run directory" in result.stdout


@pytest.mark.parametrize("ranks", [[], ["--nproc", "2"]])
def test_a_mistake_is_one_text_without_a_traceback_or_torch(tmp_path, ranks):
    words = ["train", "recipe=demo", "training.bogus=1", *ranks]
    code = f"import atexit, sys; from w1train.cli import main; atexit.register(lambda: print('torch' in sys.modules)); main({words})"
    result = python(code, tmp_path)
    assert result.returncode == 2
    assert re.match(r"w1train train: \d problems in the configuration:\n1\. training\.bogus\n", result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stdout.endswith("\nFalse\n")
    assert list(tmp_path.iterdir()) == []


def _without_machine(run_rules: Callable[..., tuple[Rule, ...]], num_ranks: int, *_: object) -> tuple[Rule, ...]:
    return run_rules(num_ranks, None)


class Launcher:
    """`w1train train`, whose ranks only write down how they were started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[str], int, Path]] = []
        self.outcome = Outcome(ExitStatus.FINISHED, "")
        monkeypatch.setattr(launcher_module, "run_local_ranks", self._run)
        # The data of the demo need not be there.
        monkeypatch.setattr(start_rules, "run_rules", partial(_without_machine, start_rules.run_rules))
        monkeypatch.setattr(launcher_module, "rank_rules", lambda _counts: ())
        monkeypatch.delenv("RANK", raising=False)

    def _run(self, arguments: list[str], num_ranks: int, logs: Path) -> Outcome:
        assert logs.is_dir()
        self.calls.append((arguments, num_ranks, logs))
        return self.outcome


@pytest.fixture
def launcher(monkeypatch):
    return Launcher(monkeypatch)


def test_ranks_are_started_in_the_callers_directory(launcher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/recipe").mkdir(parents=True)
    (tmp_path / "recipes/recipe/mine.yaml").write_text("# @package _global_\ndefaults: [demo]\nname: mine\n")
    words = ["--config-dir", "recipes", "recipe=mine", "--max-steps=7"]
    assert launcher_module.main([*words[:2], "--nproc", "2", *words[2:]]) == 0
    ((arguments, num_ranks, logs),) = launcher.calls
    assert arguments == ["-m", "w1train.pretrain", *words]
    assert num_ranks == 2
    assert logs.parent == Path("runs/mine/logs")
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(("status", "message"), [(ExitStatus.STOPPED, ""), (ExitStatus.FAILED, "rank 1 was ended by SIGKILL")])
def test_the_end_of_the_ranks_is_reported(launcher, tmp_path, capsys, status, message):
    launcher.outcome = Outcome(status, message)
    assert launcher_module.main(["recipe=demo", f"runs_dir={tmp_path}", "--nproc=2"]) == status
    assert capsys.readouterr().err == (f"w1train train: {message}\n" if message else "")


@pytest.mark.parametrize(
    ("words", "variables", "complaint"),
    [
        (["--nproc", "3"], {}, "data-parallel ranks"),
        (["--nproc", "2", "parallel.pipeline=3"], {}, "in a world of 2"),
        (["--nproc", "none"], {}, "1. --nproc\n   found: none\n   valid: a whole number > 0"),
        (["--nproc", "9" * 5000], {}, "valid: a whole number > 0"),
        (["--nproc"], {}, "1. --nproc\n   found: nothing"),
        (["--max-steps=0"], {}, "1. --max-steps\n   found: 0"),
        (["--nprocs", "2"], {}, "did you mean --nproc?"),
        (["--nproc", "2"], {"RANK": "0"}, "in a process that torchrun or srun has started as rank 0"),
    ],
)
def test_mistakes_start_no_ranks(launcher, tmp_path, monkeypatch, capsys, words, variables, complaint):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        status = launcher_module.main(["recipe=demo", f"runs_dir={tmp_path}", *words])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert complaint in capsys.readouterr().err
    assert launcher.calls == []
    assert list(tmp_path.iterdir()) == []


def test_one_rank_trains_in_the_process_itself(launcher, monkeypatch):
    trained = []
    monkeypatch.setattr(launcher_module, "train", lambda *arguments: trained.append(arguments) or 75)
    assert launcher_module.main(["recipe=demo", "--max-steps", "3", "--nproc", "1"]) == 75
    ((config, max_steps, discovery),) = trained
    assert (config.name, max_steps, discovery) == ("demo", 3, None)
    assert launcher.calls == []
