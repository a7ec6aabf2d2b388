"""Runs that are given passwords inside of URLs and secrets in the environment: no file and no line that they write has them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.end_to_end.runs import BATCH, CHECKPOINT_INTERVAL, LENGTH, TinyRun, launch, output_to
from w1train import average, evaluate, report, status
from w1train.config.serialization import config_from_yaml

PASSWORDS = ["first-Pa55word", "second/Pa55+word@home"]
DATA_PASSWORD = "short"
SIGNATURE = "5ignature0123456789"
ENVIRONMENT = {
    name: f"environment-{number}-secret"
    for number, name in enumerate(
        [
            "WANDB_API_KEY",
            "HF_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "MASTER_PASSWORD",
            "MLFLOW_TRACKING_PASSWORD",
            "MY_API_KEY",
        ]
    )
}
PROXY = "http://proxy-user:proxy-Pa55word@proxy.invalid:3128"
SECRETS = [*PASSWORDS, *ENVIRONMENT.values(), "proxy-Pa55word", SIGNATURE, f":{DATA_PASSWORD}@"]


class Vault(LocalFileSystem):
    """``vault://USER:PASSWORD@host/PATH``: files of this machine, errors that quote all that they know, as those of real storages do."""

    protocol = "vault"
    failed: ClassVar[set[str]] = set()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        path = str(path).partition("?")[0]
        return "/" + path.partition("@host/")[2].rstrip("/") if "@host/" in path else path

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        user, _, password = path.partition("://")[2].rpartition("@host/")[0].partition(":")
        return {"user": user, "password": unquote(password), "url": path}

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        # Once for each checkpoint: what fails is told and tried again.
        if rpath.endswith("config.yaml") and rpath not in self.failed:
            self.failed.add(rpath)
            known = self.storage_options
            raise OSError(f"Invalid bucket name {known['user']}:{known['password']}@host; tried {known['url']} with {known!r}")
        super().put_file(lpath, rpath, **kwargs)


fsspec.register_implementation("vault", Vault, clobber=True)


def secrets_in(folder: Path, secrets: list[str]) -> list[tuple[str, str]]:
    """(file, secret) wherever one is below the folder: as it is, as a URL has it, and as JSON has it."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            found += [
                (str(path.relative_to(folder)), secret)
                for secret in secrets
                if any(form.encode() in content for form in (secret, quote(secret), quote(secret, safe="")))
            ]
    return found


def given(run: TinyRun, folder: Path, password: str) -> list[str]:
    """Overrides with passwords in them."""
    return [
        f"checkpoint.upload='vault://amelie:{quote(password, safe='')}@host{folder}/bucket'",
        f"data.train='vault://amelie:{DATA_PASSWORD}@host{run.data}/train'",
        f"data.validation='vault://amelie:{DATA_PASSWORD}@host{run.data}/validation?X-Amz-Signature={SIGNATURE}/validation'",
        f"data.cache_directory={folder}/cache",
        "logging.wandb=offline",
    ]


def train(run: TinyRun, folder: Path, password: str, *overrides: str) -> str:
    arguments = [*given(run, folder, password), *overrides]

    def prepare(rank: int) -> None:
        os.environ.update(ENVIRONMENT, HTTPS_PROXY=PROXY, WANDB_MODE="offline")
        sys.argv = ["w1train.pretrain", *run.arguments(*arguments)]

    return run.train(*arguments, sabotage=prepare, log="log").require(0).output


HALF = f"schedule.stages.stable.tokens={(2 * CHECKPOINT_INTERVAL - 2) * BATCH * LENGTH}"


def test_a_run_writes_and_shows_no_secret(tiny_run, tmp_path):
    output = train(tiny_run, tmp_path, PASSWORDS[0], HALF)
    assert secrets_in(tmp_path, SECRETS) == []
    # What is written is all that should be, and the work was done with the passwords.
    url = f"vault://amelie:***@host{tmp_path}/bucket"
    assert url in output
    assert "Invalid bucket name amelie:***@host; tried vault://amelie:***@host" in output
    for path in [tiny_run.path / "config.yaml", *tiny_run.checkpoints.glob("step_*/config.yaml")]:
        assert config_from_yaml(path).checkpoint.upload == url
    assert len(list((tmp_path / "bucket").glob("step_*/config.yaml"))) == 2
    assert any("amelie:***@host" in path.read_text(errors="replace") for path in (tiny_run.path / "wandb").rglob("*.wandb"))


@pytest.mark.slow
def test_a_resume_and_other_commands_show_no_secret(tiny_run, tmp_path):
    """Resume with another password, which is no change of the configuration, and read the run with each command."""
    train(tiny_run, tmp_path, PASSWORDS[0], HALF)
    again = train(tiny_run, tmp_path, PASSWORDS[1])
    assert "configuration changed on resume: schedule" in again
    assert "configuration changed on resume: checkpoint" not in again
    assert "configuration changed on resume: data" not in again
    assert "Invalid bucket name amelie:***@host" in again
    assert secrets_in(tmp_path, SECRETS) == []

    run, steps = str(tiny_run.path), ["--steps", "9,12"]
    (validation,) = (word for word in given(tiny_run, tmp_path, PASSWORDS[1]) if word.startswith("data.validation="))
    url = validation.partition("=")[2].strip("'")
    assert "finished" in shown_by(tmp_path, status.main, [run], 0)
    shown_by(tmp_path, lambda words: report.main(), [run], 0)
    for command, words in [(evaluate.main, []), (average.main, steps)]:
        assert "*** stands for a password, which a run's config.yaml does not have" in shown_by(tmp_path, command, [run, *words], 2)
        assert not list(tiny_run.checkpoints.glob("average_*")), "what is missing is said before the work"
    for command, words in [(evaluate.main, []), (average.main, steps)]:
        shown_by(tmp_path, command, [run, *words, "--validation", url], 0)
    assert '"kind":"average"' in (tiny_run.path / "metrics.jsonl").read_text()
    assert secrets_in(tmp_path, SECRETS) == []


def shown_by(folder: Path, command: Callable[[list[str]], int | None], words: list[str], expected: int) -> str:
    """What a command shows in a process of its own."""
    log = folder / f"command-{len(list(folder.glob('command-*')))}"

    def run(rank: int) -> int:
        sys.argv = ["command", *words]
        with output_to(log):
            return command(words) or 0

    assert launch(1, run) == [expected], log.read_text()
    return log.read_text()


def test_what_fails_before_a_run_shows_no_secret(tiny_run, tmp_path):
    overrides = [
        *given(tiny_run, tmp_path, PASSWORDS[1]),
        f"data.tokenizer=s3://amelie:{PASSWORDS[0]}@host/tokenizer.json?sig={SIGNATURE}",
        f"model.hidden_size='s3://amelie:{PASSWORDS[0]}@host'",
        f"nowhere=s3://amelie:{PASSWORDS[0]}@host/{'x' * 80}",
        f"data.blend={{a:{{prefix:'s3://amelie:{PASSWORDS[0]}@host'}}}}",
        f"s3://amelie:{PASSWORDS[0]}@host",
    ]
    output = tiny_run.train(*overrides).require(2).output
    assert "amelie:***@host" in output
    assert secrets_in(tmp_path, SECRETS) == []


def test_the_printed_configuration_has_no_secret(tiny_run, tmp_path):
    output = tiny_run.train("--cfg", "job", *given(tiny_run, tmp_path, PASSWORDS[1])).require(0).output
    assert output.count("amelie:***@host") == 3
    assert secrets_in(tmp_path, SECRETS) == []


def test_a_traceback_shows_no_secret(tiny_run, tmp_path):
    """A fault of the program itself keeps its traceback, with the text of the exception."""

    def fault(rank: int) -> None:
        from w1train.training import run_parts

        def broken(*_: Any) -> None:
            raise KeyError(f"vault://amelie:{PASSWORDS[0]}@host: wrong password {PASSWORDS[0]}")

        run_parts.prepare_data = broken

    outcome = tiny_run.train(*given(tiny_run, tmp_path, PASSWORDS[0]), sabotage=fault)
    assert outcome.statuses == [1]
    assert "KeyError: 'vault://amelie:***@host: wrong password ***'" in outcome.output
    assert secrets_in(tmp_path, SECRETS) == []
