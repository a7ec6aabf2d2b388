"""The commands, run in this process, and a run directory and datasets for them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.reports.fake_run import write_fake_run
from tests.tiny import tiny_config
from w1train import status
from w1train.config.schema import Config
from w1train.config.serialization import config_to_yaml
from w1train.data.dataset_manifest import DatasetManifest
from w1train.data.indexed import write_index
from w1train.data.tokenizer import Tokenizer, train_tokenizer

MOST_LINES = 230
"""The longest answer: fifty problems of four lines each."""

Main = Callable[[list[str]], int | None]


def answer(main: Main, arguments: list[str], capture: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status of a command, and all that it says."""
    # Handlers that an earlier command has set up write to that test's stream.
    logging.getLogger().handlers.clear()
    capture.readouterr()
    try:
        ending: object = main(arguments)
    except SystemExit as end:
        ending = end.code
    out, err = capture.readouterr()
    said = out + err + (ending if isinstance(ending, str) else "")
    return 1 if isinstance(ending, str) else int(ending or 0), said


def require_refusal(main: Main, arguments: list[str], capture: pytest.CaptureFixture[str], status: int, *texts: str) -> str:
    """Assert that a command ends by the status of a user's mistake, with few lines that have all the texts; they are returned."""
    found, said = answer(main, arguments, capture)
    assert found == status, said[-2000:]
    assert "Traceback" not in said
    assert len(said.splitlines()) <= MOST_LINES, said[:2000]
    assert max(map(len, said.splitlines()), default=0) < 4000
    assert "\x1b" not in said
    for text in texts:
        assert text in said, said[-2000:]
    return said


@contextlib.contextmanager
def may_refuse(kind: type[Exception], text: str) -> Iterator[None]:
    """Whatever is in the block may end with an error of this kind, which names the text, and with no other."""
    try:
        yield
    except kind as error:
        said = str(error)
    else:
        return
    assert text in said


def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["hello world, foo and bar " * 20], 272 + 16)


def run_config(**sections: dict) -> Config:
    return tiny_config(model={"vocab_size": 320}, **sections)


def make_run(directory: Path, config: Config | None = None) -> Path:
    """A run directory as training leaves it, but for the weights: its checkpoint's only file is its configuration."""
    write_fake_run(directory, num_steps=20)
    (directory / "events.jsonl").write_text('{"step":0,"event":"start","time":1.0}\n{"step":5,"event":"checkpoint","time":2.0}\n')
    text = config_to_yaml(config or run_config())
    (directory / "config.yaml").write_text(text)
    tiny_tokenizer().save(directory / "tokenizer.json")
    for step in (4, 8):
        write_checkpoint(directory, step, text)
    values = {"state": "running", "step": 8, "num_steps": 20, "tokens": 1, "total_tokens": 2, "time": time.time(), "pid": 1, "host": "far"}
    (directory / "status.json").write_text(json.dumps({**values, "world_size": 1, "message": None}))
    heartbeat = {"rank": 0, "host": "far", "pid": 1, "step": 8, "activity": "training", "time": time.time(), "progress": time.time()}
    (directory / "heartbeats").mkdir(exist_ok=True)
    (directory / "heartbeats/rank_00000.json").write_text(json.dumps({**heartbeat, "place": "f"}))
    return directory


def write_checkpoint(run: Path, step: int, config: str, **changes: object) -> Path:
    """A checkpoint whose manifest fits its only file."""
    checkpoint = run / f"checkpoints/step_{step:010d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "config.yaml").write_text(config)
    entry = {"size": len(config.encode()), "sha256": hashlib.sha256(config.encode()).hexdigest()}
    manifest = {"step": step, "samples": 8 * step, "seconds": 1.0, "dataset": None, "health": {}, "files": {"config.yaml": entry}}
    scores = {"elbo": 3.0, "masked_cross_entropy": 2.0}
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "validation": scores, **changes}))
    return checkpoint


def make_dataset(prefix: Path) -> Path:
    """Three documents, and their manifest."""
    tokens = np.array([30, 31, 1, 32, 1, 33, 34, 35, 1], dtype="uint16")
    bin_file, idx_file = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
    bin_file.write_bytes(tokens.tobytes())
    with idx_file.open("w+b") as file:
        write_index(file, tokens.dtype, np.array([3, 2, 4], dtype="<i4"))
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in (("bin", bin_file), ("idx", idx_file))}
    tokenizer = tiny_tokenizer()
    DatasetManifest(
        created_by="tests",
        num_documents=3,
        num_tokens=9,
        num_bytes=12,
        dtype="uint16",
        max_token_id=35,
        unigram_bits_per_byte=2.0,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_vocab_size=tokenizer.vocab_size,
        eos_token_id=1,
        mask_token_id=14,
        bin_num_bytes=bin_file.stat().st_size,
        bin_sha256=hashes["bin"],
        idx_num_bytes=idx_file.stat().st_size,
        idx_sha256=hashes["idx"],
        corpus={"num_bad": 0, "num_empty": 0, "num_filtered": 0, "num_duplicates": 0},
    ).write(prefix.with_suffix(".json"))
    return prefix


def status_main(arguments: list[str]) -> int:
    return int(status.main(arguments))
