"""What launch.slurm prints and refuses. A changed line of a golden script is a reviewed change (UPDATE_GOLDEN=1).

plain.sh is a whole script; the other files are the half that says what to run, for the half that runs it is the same in all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.slurm_arguments import _seconds, parse
from launch.slurm_script import render
from w1train.config.errors import ConfigurationError

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
SECOND_HALF = "# The second half of a job's script"
"""Its first line."""
HOME = Path("/home/me/w1train")
"""The checkout, and the directory of the caller unless a test says another one."""

PROFILED = ["profiling.tool=nsys", "profiling.steps=[20,24]", "profiling.ranks=[0,8]"]
CASES = {
    "plain": ["--nodes", "2", "--partition", "gpu", "--time", "24:00:00", "--", "recipe=w1_4b"],
    "cpu": ["--gpus-per-node", "0", "--ranks-per-node", "2", "--cpus-per-rank", "4", "--no-requeue", "--", "recipe=demo", "name=small"],
    "container": [
        *("--nodes", "8", "--account", "llm", "--qos", "high", "--time", "2-0"),
        *("--python", "python", "--container-image", "/images/w1train.sqsh", "--container-mounts", "/data:/data:ro"),
        *(
            "--env",
            "NCCL_DEBUG=INFO",
            "--env",
            "NOTE=it's two words",
            "--setup",
            "module load slurm",
            "--sbatch=--exclusive",
            "--srun=--container-env=NCCL_DEBUG",
        ),
        *("--", "recipe=w1_4b", "parallel.tensor=4", "runs_dir=/scratch/me/runs"),
    ],
    "chain": [
        *("--nodes", "4", "--chain", "5", "--time", "12:00:00", "--max-failures", "2", "--nsys=0,8"),
        *("--", "recipe=llada_1b", *PROFILED),
    ],
}


def script(*words: str, directory: Path = HOME, code: Path | None = HOME) -> str:
    submission = parse(["--python", "/home/me/.venv/bin/python", *words], directory, code)
    return render(submission.job, submission.run, submission.arguments)


def golden(name: str) -> str:
    """The whole script that must be rendered."""
    plain = (GOLDEN / "plain.sh").read_text()
    if name == "plain":
        return plain
    return (GOLDEN / f"{name}.sh").read_text() + plain[plain.index(SECOND_HALF) :]


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    path = GOLDEN / f"{name}.sh"
    text = script(*CASES[name])
    if "UPDATE_GOLDEN" in os.environ:
        path.write_text(text if name == "plain" else text[: text.index(SECOND_HALF)])
    assert text == golden(name), f"{path} is not what launch.slurm renders: look at the difference, then UPDATE_GOLDEN=1"


@pytest.mark.parametrize("name", CASES)
def test_shellcheck_has_nothing_to_say(name):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, "-"], input=golden(name), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_dry_run_prints_the_script_that_would_be_submitted(capsys, monkeypatch, tmp_path):
    """To the byte, and it writes nothing."""
    monkeypatch.chdir(tmp_path)
    words = ["--python", "python", "--partition", "gpu"]
    assert slurm.main([*words, "--dry-run", "--", "recipe=w1_4b"]) == 0
    submission = parse([*words, "--", "recipe=w1_4b"], tmp_path, slurm.checkout())
    assert capsys.readouterr().out == render(submission.job, submission.run, submission.arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_callers_directory_and_the_code_are_two_places():
    """Relative paths begin at the first, and modules are found in the second, also in a container."""
    text = script("--container-image", "x", "--", "recipe=w1_4b", directory=Path("/data/me/project"))
    assert "#SBATCH --chdir=/data/me/project\n" in text
    assert "run=/data/me/project/runs/w1_4b\n" in text
    assert 'export PYTHONPATH=/home/me/w1train"${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1\n' in text
    assert "--container-mounts=/data/me/project:/data/me/project,/home/me/w1train:/home/me/w1train'" in text
    assert "--container-workdir=/data/me/project\n" in text
    assert "PYTHONPATH" not in script("--", "recipe=w1_4b", code=None)
    assert slurm.checkout() == REPOSITORY


def test_the_script_that_submits_keeps_the_callers_directory(stand_in, tmp_path):
    """launch/slurm.sh, with modules of the same names in the caller's directory."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/__init__.py").write_text("raise SystemExit('a module of the caller')")
    (tmp_path / "venv").symlink_to(sys.prefix)
    command = [REPOSITORY / "launch/slurm.sh", "--dry-run", "--gpus-per-node=0", "--", "recipe=demo"]
    result = subprocess.run(command, env=os.environ | {"VENV": "venv"}, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"#SBATCH --chdir={tmp_path}\n" in result.stdout
    assert f"run={tmp_path}/runs/demo\n" in result.stdout
    assert f"export PYTHONPATH={REPOSITORY}" in result.stdout


def test_variables_of_the_job_reach_every_step():
    """Whatever ``sbatch --export`` was: with NONE, Slurm sets SLURM_EXPORT_ENV, which srun takes for its own option. The user has the last
    word."""
    text = script("--container-image", "x", "--srun=--export=NONE", "--sbatch=--export=NONE", "--", "recipe=w1_4b")
    options, status = text.split("srun_options=(")[1].split("status_command=(")
    assert options.split()[0] == "--export=ALL"
    assert options.split(")")[0].split()[-1] == "--export=NONE"
    assert status.split()[:2] == ["srun", "--export=ALL"]


def test_words_reach_the_ranks_as_they_were_typed():
    """Through quoting, and bash."""
    typed = ["recipe=demo", "name=small", 'sampling.prompts=["def \'main\'(", "$HOME"]']
    text = script("--gpus-per-node", "0", "--", *typed)
    array = text[text.index("command=(") : text.index("status_command=(")]
    printed = subprocess.run(
        ["bash", "-c", array + "\nprintf '%s\\0' \"${command[@]}\""], capture_output=True, text=True, check=True
    ).stdout
    assert printed.split("\0")[3:-1] == typed


@pytest.mark.parametrize(
    ("words", "complaints"),
    [
        (["--nodes", "0", "--", "recipe=w1_4b"], ["--nodes", "a whole number >= 1"]),
        (["--gpus-per-node", "3", "--", "recipe=w1_4b", "parallel.tensor=2"], ["in a world of 3"]),
        (["--nodes", "3", "--", "recipe=w1_4b"], ["data-parallel ranks (", "x 24 = "]),
        (["--nodez", "2", "--", "recipe=w1_4b"], ["--nodez", "did you mean --nodes?"]),
        (["recipe=w1_4b"], ["options before --, and the recipe and overrides after it", "recipe=w1_4b"]),
        (
            ["--time", "1 day", "--nodes", "x", "--", "recipe=w1_4b", "model.hiden_size=3"],
            ["3 problems", "--time", "--nodes", "hidden_size"],
        ),
        (["--time", "2", "--", "recipe=w1_4b"], ["more than the 160 s before its end"]),
        (["--env", "NCCL", "--", "recipe=w1_4b"], ["NAME=VALUE"]),
        (["--container-mounts", "/data:/data", "--", "recipe=w1_4b"], ["only with --container-image"]),
        (["--container-image", "x", "--container-mounts", "/a:/a,/b:/b", "--", "recipe=w1_4b"], ["one mount each"]),
        (["--sbatch=--signal=USR2@30", "--", "recipe=w1_4b"], ["--signal=USR2@30", "health.stop_timeout"]),
        (["--sbatch=-C", "--", "recipe=w1_4b"], ["one long option"]),
        (["--srun=label", "--", "recipe=w1_4b"], ["one long option of srun"]),
        (["--nsys=first", "--", "recipe=w1_4b"], ["ranks separated by commas"]),
        (["--nsys", "--", "recipe=w1_4b"], ["profiling.tool=torch, profiling.steps=[]", "profiling.tool=nsys"]),
        (["--nsys", "--", "recipe=w1_4b", "profiling.steps=[3]"], ["profiling.tool=torch"]),
        (["--nsys=0,1", "--", "recipe=w1_4b", *PROFILED], ["--nsys", "profiling.ranks=[0, 8]"]),
        (["--", "recipe=w1_4b", "--cfg", "job"], ["a flag that only prints"]),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(words, complaints):
    with pytest.raises(ConfigurationError) as error:
        parse(words, HOME)
    for complaint in complaints:
        assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("w1train.sqsh", "/home/me/w1train/w1train.sqsh"),
        ("./images/w1train.sqsh", "/home/me/w1train/images/w1train.sqsh"),
        ("/images/w1train.sqsh", "/images/w1train.sqsh"),
        ("nvcr.io#nvidia/pytorch:26.07-py3", "nvcr.io#nvidia/pytorch:26.07-py3"),
        ("ubuntu", "ubuntu"),
    ],
)
def test_an_image_file_is_no_name_in_a_registry(name, image):
    """pyxis tells them apart by the first character alone."""
    assert f"  --container-image={image}\n" in script("--container-image", name, "--", "recipe=w1_4b").replace("'", "")


def test_a_runs_folder_that_is_a_link_is_mounted_where_it_leads(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "code/runs").symlink_to(tmp_path / "scratch")
    submission = parse(["--container-image", "x", "--", "recipe=w1_4b"], tmp_path / "code")
    text = render(submission.job, submission.run, submission.arguments)
    assert f"--container-mounts={tmp_path}/code:{tmp_path}/code,{tmp_path}/scratch:{tmp_path}/scratch" in text


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:30:15", 9015),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-2:30:15", 95415),
        ("1h", None),
        ("1:2:3:4", None),
    ],
)
def test_times_are_slurms(time, seconds):
    assert _seconds(time) == seconds


def test_a_chain_is_submitted_job_by_job(stand_in, tmp_path, capsys):
    stand_in.command("sbatch", f"echo $(($(grep -c ^sbatch {stand_in.calls_file}) + 40))';cluster'")
    assert slurm.main(["--gpus-per-node", "0", "--chain", "3", "--", "recipe=demo"]) == 0
    logs = tmp_path / "runs/demo/logs"
    job = str(logs / "job.sh")
    assert stand_in.calls("sbatch") == [
        ["--parsable", job],
        ["--parsable", "--dependency=afterany:41", job],
        ["--parsable", "--dependency=afterany:42", job],
    ]
    assert (logs / "chain").read_text() == "41\n42\n43\n"
    assert "job 41, 42, 43, 1 ranks on 1 nodes" in capsys.readouterr().out
    assert slurm.main(["--gpus-per-node", "0", "--dry-run", "--chain", "3", "--", "recipe=demo"]) == 0
    assert capsys.readouterr().out == Path(job).read_text()


def test_a_refused_chain_leaves_no_half(stand_in, capsys):
    stand_in.command("sbatch", f"[ $(grep -c ^sbatch {stand_in.calls_file}) = 2 ] && {{ echo 'invalid dependency' >&2; exit 1; }}; echo 41")
    stand_in.command("scancel", "")
    assert slurm.main(["--gpus-per-node", "0", "--chain", "3", "--", "recipe=demo"]) == 1
    assert "invalid dependency" in capsys.readouterr().err
    assert stand_in.calls("scancel") == [["41"]]


def test_no_second_chain_beside_a_living_one(stand_in, tmp_path, capsys):
    """Each would cancel, and count, only what is in the list."""
    stand_in.command("sbatch", "echo 41")
    words = ["--gpus-per-node", "0", "--chain", "2", "--", "recipe=demo"]
    assert slurm.main(words) == 0
    stand_in.command("squeue", "echo 41")
    assert slurm.main(words) == 1
    assert "scancel 41" in capsys.readouterr().err
    assert len(stand_in.calls("sbatch")) == 2
    assert stand_in.calls("squeue") == [["--me", "--noheader", "--format=%i", "--name=demo", "--jobs=41,41"]]
    stand_in.command("squeue", "echo 'Invalid job id specified' >&2; exit 1")
    assert slurm.main(words) == 0


def test_without_squeue_a_living_chain_cannot_be_ruled_out(stand_in, tmp_path, monkeypatch, capsys):
    stand_in.command("sbatch", "echo 41")
    words = ["--gpus-per-node", "0", "--chain", "2", "--", "recipe=demo"]
    assert slurm.main(words) == 0
    monkeypatch.setenv("PATH", str(stand_in.directory))
    assert slurm.main(words) == 1
    assert "squeue" in capsys.readouterr().err
    (tmp_path / "runs/demo/logs/chain").write_text("")
    assert slurm.main(words) == 0, "nothing to ask for"


def test_without_slurm_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert slurm.main(["--gpus-per-node", "0", "--", "recipe=demo"]) == 1
    assert "sbatch is not on PATH" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--", "recipe=demo", "checkpoint.upload='s3://user:hunter2@host/runs'"],
        ["--env", "HTTPS_PROXY=http://user:hunter2@proxy:3128", "--", "recipe=demo"],
        ["--setup", "curl https://user:hunter2@host/setup.sh | sh", "--", "recipe=demo"],
    ],
)
def test_a_password_goes_into_no_script(words, capsys):
    """The script lies in the run directory, and Slurm keeps a copy."""
    assert slurm.main(["--dry-run", *words]) == 2
    printed = capsys.readouterr()
    assert "hunter2" not in printed.out + printed.err
    assert "user:***@" in printed.err
    assert "export VARIABLE=URL" in printed.err


def test_the_way_that_is_proposed_keeps_the_password_out(monkeypatch):
    monkeypatch.setenv("VARIABLE", "s3://user:hunter2@host/runs")
    text = script("--", "recipe=w1_4b", "checkpoint.upload=${oc.env:VARIABLE}")
    assert "hunter2" not in text
    assert "'checkpoint.upload=${oc.env:VARIABLE}'" in text


def test_relative_paths_of_the_script_begin_where_the_caller_is(tmp_path):
    """launch/slurm.sh, typed in another directory than the checkout."""
    (tmp_path / "recipes/recipe").mkdir(parents=True)
    (tmp_path / "recipes/recipe/mine.yaml").write_text("# @package _global_\ndefaults: [demo]\nname: mine\n")
    words = ["--gpus-per-node", "0", "--dry-run", "--", "--config-dir", "recipes", "recipe=mine"]
    command = [str(REPOSITORY / "launch/slurm.sh"), *words]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | {"VENV": sys.prefix}, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert f"#SBATCH --chdir={tmp_path}\n" in result.stdout
    assert f"\nrun={tmp_path}/runs/mine\n" in result.stdout
    assert "  --config-dir\n  recipes\n  recipe=mine\n" in result.stdout
