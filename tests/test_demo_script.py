"""launch/demo.sh with a stand-in for Python that only writes what it was asked for: order, arguments, and what is not repeated."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.test_readme import check_python, check_w1train
from w1train.config.compose import load_config
from w1train.config.rules.validate import validate
from w1train.model.flops import num_active_parameters, num_parameters

REPOSITORY = Path(__file__).resolve().parent.parent
STAND_IN = """#!/bin/sh
printf '%s' "${0##*/}" >>LOG
printf ' %s' "$@" >>LOG
echo >>LOG
case "$2" in FAILING) exit 3 ;; esac
while [ $# -gt 1 ]; do
  case "$1" in
    --output) touch "$2" ;;
    --validation-output) touch "$2.json" ;;
  esac
  shift
done
"""

TRAINING = ["w1train train", "benchmarks.words", "w1train report"]
"""What follows the steps of the data."""


def program(words: list[str]) -> str:
    """The module of `python -m MODULE ...`, and the verb of the one command."""
    return " ".join(words[2:4]) if words[2] == "w1train" else words[2]


class Demo:
    """Runs of the script, or of another script of launch/, in one place."""

    def __init__(self, directory: Path, script: str = "demo.sh") -> None:
        self.directory = directory
        self.script = REPOSITORY / "launch" / script
        self.log = directory / "log"
        self.write_stand_ins()

    def write_stand_ins(self, failing: str = "none") -> None:
        path = self.directory / "venv" / "bin" / "python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN.replace("LOG", str(self.log)).replace("FAILING", failing))
        path.chmod(0o755)

    def run(self, *overrides: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        """The result, and the commands that were run."""
        self.log.write_text("")
        names = {"VENV": str(self.directory / "venv"), "RUNS": str(self.directory / "runs"), "PATH": "/usr/bin:/bin"}
        environment = os.environ | names | variables
        result = subprocess.run([str(self.script), *overrides], env=environment, capture_output=True, text=True, timeout=60)
        return result, [shlex.split(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    return Demo(tmp_path)


def test_steps_in_order_with_arguments_that_their_programs_take(demo):
    result, commands = demo.run("training.seed=7", NPROC="2")
    assert result.returncode == 0, result.stderr
    assert commands[3][-1] == "training.seed=7"
    modules = ["data_tools.python_corpus", "data_tools.train_tokenizer", "data_tools.tokenize", *TRAINING]
    assert [program(words) for words in commands] == modules
    for _, option, module, *words in commands:
        check_w1train(words) if module == "w1train" else check_python([option, module, *words])


def test_the_comparison_of_processes_runs_its_steps_in_order(tmp_path):
    result, commands = Demo(tmp_path, "processes.sh").run("training.seed=7", "model.num_layers=1", NPROC="3")
    assert result.returncode == 0, result.stderr
    parts = [f"benchmarks.processes.{name}" for name in ("train", "correct", "page")]
    modules = ["data_tools.python_corpus", "benchmarks.processes.characters", "data_tools.tokenize", *parts]
    assert [program(words) for words in commands] == modules
    for _, option, module, *words in commands:
        check_python([option, module, *words])
    training = commands[3]
    assert training[-1] == "3"
    assert {"training.seed=7", "model.num_layers=1"} < set(training)


def test_post_training_runs_its_steps_in_order(tmp_path):
    result, commands = Demo(tmp_path, "post_training.sh").run("training.seed=7", NPROC="1")
    assert result.returncode == 0, result.stderr
    data = [
        "benchmarks.post_training.question_texts",
        "benchmarks.processes.characters",
        *["data_tools.tokenize"] * 2,
        *["data_tools.conversations"] * 4,
    ]
    measured = [*["benchmarks.post_training.accuracy"] * 5, "benchmarks.post_training.post_training_page"]
    assert [program(words) for words in commands] == [*data, *["w1train train"] * 5, *measured]
    for _, option, module, *words in commands:
        check_w1train(words) if module == "w1train" else check_python([option, module, *words])
    trained = [dict(word.split("=", 1) for word in words if "=" in word) for words in commands if program(words) == "w1train train"]
    assert all(words["training.seed"] == "7" for words in trained)
    parents = {words["name"]: words.get("training.initial_weights", "").rpartition("/")[2] for words in trained}
    tuned = dict.fromkeys(("demo_cap", "demo_sft_longer", "demo_dpo"), "demo_sft")
    assert parents == {"demo_pretrain": "", "demo_sft": "demo_pretrain", **tuned}


def test_a_second_run_repeats_no_data_step(demo):
    demo.run(NPROC="2")
    result, commands = demo.run(NPROC="2")
    assert [program(words) for words in commands] == TRAINING
    assert result.stdout.count("done before") == 3


def test_another_corpus_in_the_same_place_is_refused(demo):
    demo.run(NPROC="2")
    result, commands = demo.run(NPROC="2", CORPUS="my/corpus")
    assert result.returncode == 1
    assert commands == []
    assert "was made from: Python standard library" in result.stderr
    result, commands = demo.run(NPROC="2", CORPUS="my/corpus", RUNS=str(demo.directory / "other"))
    assert result.returncode == 0
    assert commands[0][commands[0].index("--input") + 1] == "my/corpus"


def test_a_corpus_that_gave_nothing_binds_nothing(demo):
    demo.write_stand_ins(failing="data_tools.train_tokenizer")
    demo.run(NPROC="2", CORPUS="mistyped")
    demo.write_stand_ins()
    result, commands = demo.run(NPROC="2", CORPUS="my/corpus")
    assert result.returncode == 0, result.stderr
    assert commands[0][commands[0].index("--input") + 1] == "my/corpus"
    result, _ = demo.run(NPROC="2", CORPUS="mistyped")
    assert "was made from: my/corpus" in result.stderr


def test_tokens_bind_to_their_corpus_too(demo):
    demo.run(NPROC="2", CORPUS="my/corpus")
    (demo.directory / "runs/demo-data/tokenizer.json").unlink()
    result, commands = demo.run(NPROC="2", CORPUS="another")
    assert (result.returncode, commands) == (1, [])
    assert "was made from: my/corpus" in result.stderr


@pytest.mark.parametrize(("num_ranks", "expert_ranks"), [(1, 1), (2, 2)])
def test_another_recipe_is_trained_on_the_same_data_and_compared_with_the_demo(demo, num_ranks, expert_ranks):
    demo.run(NPROC="2")
    variables = {"NPROC": str(num_ranks), "RECIPE": "demo_moe"}
    result, commands = demo.run(**variables)
    assert result.returncode == 0, result.stderr
    assert [program(words) for words in commands] == TRAINING
    launch = commands[0][3:]
    assert "recipe=demo_moe" in launch
    check_w1train(launch)
    config = load_config([word for word in launch if "=" in word])
    assert not validate(config, world_size=num_ranks)
    assert config.parallel.expert == expert_ranks
    dense = load_config([word.replace("demo_moe", "demo") for word in launch if "=" in word])
    assert config.data == dense.data
    assert 0.999 * num_parameters(dense.model) < num_active_parameters(config.model) <= num_parameters(dense.model)
    (demo.directory / "runs" / "demo").mkdir()
    (demo.directory / "runs" / "demo" / "summary.json").touch()
    _, commands = demo.run(**variables)
    *_, comparison = commands
    check_w1train(comparison[3:])
    runs = demo.directory / "runs"
    assert comparison[4:] == [str(runs / "demo"), str(runs / "demo_moe"), "--output", str(runs / "demo_moe/comparison.html"), "--overwrite"]


def test_a_step_that_fails_ends_the_demo(demo):
    demo.write_stand_ins(failing="data_tools.train_tokenizer")
    result, commands = demo.run(NPROC="2")
    assert result.returncode == 3
    assert len(commands) == 2


@pytest.mark.parametrize(("num_gpus", "num_ranks"), [(0, 2), (1, 1), (2, 2), (3, 2), (4, 2), (8, 2)])
def test_ranks_follow_the_gpus(demo, num_gpus, num_ranks):
    tools = demo.directory / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\n")
    (tools / "nvidia-smi").chmod(0o755)
    python = demo.directory / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {num_gpus}\n' + python.read_text().removeprefix("#!/bin/sh\n"))
    result, commands = demo.run(PATH=f"{tools}:/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    (launch,) = [words for words in commands if program(words) == "w1train train"]
    assert launch[launch.index("--nproc") + 1] == str(num_ranks)
    assert not validate(load_config(["recipe=demo"]), world_size=num_ranks)
