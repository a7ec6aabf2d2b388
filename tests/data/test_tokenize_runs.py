"""A run of data_tools.tokenize gives the same files however many workers it has and however often it is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_tools import inspect, tokenize, workers
from data_tools.duplicates import SeenHashes, hash_of
from data_tools.workers import OrderedWorkers, WorkerError, ordered_workers
from tests.data.conftest import TEXTS
from tests.slow import LONGER_THAN_A_TEST, slow_except

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """150 kB in 9 units: JSONL with bad lines and duplicates, and some text files."""
    directory = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": TEXTS[i % 50] * (i % 5 + 1) + str(i % 500)}) + "\n" for i in range(800)]
    lines[17], lines[600] = "{\n", json.dumps({"text": " "}) + "\n"
    for i in range(8):
        (directory / f"a{i}.jsonl").write_text("".join(lines[100 * i : 100 * i + 100]))
    for i in range(4):
        (directory / f"b{i}.txt").write_text(TEXTS[i] * 100)
    return directory


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return path


def arguments(corpus, tokenizer_file, directory, *more):
    """Everything at once: two outputs, shards, duplicates and records as often as can be."""
    options = ["--validation-output", f"{directory}/validation", "--validation-fraction", "0.1", "--shard-size", "15000", "--deduplicate"]
    options += ["--on-error", "skip", "--record-seconds", "0", *more]
    return ["--input", str(corpus), "--tokenizer", str(tokenizer_file), "--output", f"{directory}/train", *options]


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def expected(corpus, tokenizer_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("expected")
    assert tokenize.main(arguments(corpus, tokenizer_file, directory, "--workers", "1")) == 0
    return content(directory)


def test_what_was_read_and_left_out_is_in_the_manifest(expected):
    assert {"train_00003.bin", "validation_00000.bin"} <= expected.keys()
    manifests = {name: json.loads(text) for name, text in expected.items() if name.endswith(".json")}
    counts = manifests["train_00000.json"]["corpus"]
    assert counts["num_bad"] == counts["num_empty"] == 1
    # Equal texts have equal i modulo 500: the lines from 500 on repeat the first 300, but for the two that are none.
    assert counts["num_duplicates"] == 298
    assert counts["num_documents"] == 504 == sum(manifest["num_documents"] for manifest in manifests.values())
    assert counts["options"]["deduplicate"] is True
    assert all(manifest["corpus"] == counts for manifest in manifests.values())
    sizes = [manifests[name]["num_tokens"] for name in manifests if name.startswith("train")]
    assert all(size >= 15_000 for size in sizes[:-1])


@pytest.mark.parametrize("max_threads", [1, 2], ids=["processes", "threads"])
def test_two_workers_write_the_same(corpus, tokenizer_file, expected, tmp_path, monkeypatch, max_threads):
    monkeypatch.setattr(workers, "MAX_THREADS", max_threads)
    assert tokenize.main(arguments(corpus, tokenizer_file, tmp_path, "--workers", "2")) == 0
    assert content(tmp_path) == expected


@pytest.mark.slow  # tests/data/test_data_commands.py has one kill
@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_killed_at_random_moments(corpus, tokenizer_file, expected, tmp_path, num_workers):
    """Each time a little later, until a run comes to its end."""
    command = [sys.executable, "-m", "data_tools.tokenize", *arguments(corpus, tokenizer_file, tmp_path, "--workers", num_workers)]
    generator = random.Random(0)
    num_kills = num_resumed = 0
    for _ in range(30):
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while process.poll() is None and not any(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1 + 0.15 * num_kills))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        num_resumed += "resuming an interrupted run" in errors
        # Refused: the run before was killed when it had done everything but end.
        if process.returncode == 0 or (num_kills and "exist already" in errors):
            break
        assert process.returncode == -signal.SIGKILL, errors
        num_kills += 1
    else:
        assert tokenize.main(arguments(corpus, tokenizer_file, tmp_path, "--workers", num_workers)) == 0
    assert content(tmp_path) == expected
    assert num_kills > 0


@pytest.mark.parametrize("moment", slow_except([7, 10**9], [0, 3, 7, 9, 12, 20, 10**9]))
def test_interrupted_at_a_certain_record(corpus, tokenizer_file, expected, tmp_path, moment, monkeypatch, caplog):
    """After so many files have been replaced or renamed: the same at every step of the records and of the publication."""
    left = [moment]
    replace = os.replace

    def failing(*names):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(os, "replace", failing)
    command = arguments(corpus, tokenizer_file, tmp_path, "--workers", "1")
    status = tokenize.main(command)
    assert status == (0 if moment == 10**9 else 130)
    monkeypatch.undo()
    with caplog.at_level("INFO"):
        if status:
            assert tokenize.main(command) == 0
    assert ("resuming an interrupted run" in caplog.text) == (0 < moment < 10**9)
    assert content(tmp_path) == expected


def test_a_record_of_other_input_or_damaged_files_is_not_gone_on_with(corpus, tokenizer_file, expected, tmp_path, monkeypatch, caplog):
    command = arguments(corpus, tokenizer_file, tmp_path, "--workers", "1")
    for damage, message in [
        (lambda: (tmp_path / "train_00001.bin.partial").write_bytes(b""), "the run starts from the beginning"),
        (lambda: (tmp_path / "train.progress.partial").write_text("[]"), "is not a record of this version"),
        (lambda: (tmp_path / "train.hashes.partial").write_bytes(b""), "its progress record says"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr("data_tools.outputs.Outputs.seal", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert tokenize.main(command) == 130
        damage()
        caplog.clear()
        assert tokenize.main(command) == 0
        assert message in caplog.text
        assert content(tmp_path) == expected
        for path in tmp_path.iterdir():
            path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.outputs.Outputs.seal", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert tokenize.main([*command, "--min-bytes", "100"]) == 130
    assert tokenize.main(command) == 0
    assert "is of a run with other input or options" in caplog.text
    assert content(tmp_path) == expected


def test_old_shards_are_kept_or_all_replaced(corpus, tokenizer_file, tmp_path, caplog):
    command = ["--input", str(corpus / "b0.txt"), "--split-on", "^def", "--tokenizer", str(tokenizer_file), "--output", f"{tmp_path}/x"]
    assert tokenize.main([*command, "--shard-size", "1000"]) == 0
    assert (tmp_path / "x_00002.json").exists()
    assert tokenize.main([*command, "--shard-size", "5000"]) == 1
    assert "x_00000.json, " in caplog.text
    assert "exist already: choose another name, or give --overwrite" in caplog.text
    assert tokenize.main([*command, "--shard-size", "10000000", "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_00000.bin", "x_00000.idx", "x_00000.json"]


def test_two_runs_cannot_write_the_same(corpus, tokenizer_file, tmp_path, caplog, monkeypatch):
    command = arguments(corpus, tokenizer_file, tmp_path, "--workers", "1")
    statuses = []
    seal = tokenize.Outputs.seal

    def another_run(self, position):
        monkeypatch.undo()
        statuses.append(tokenize.main(command))
        seal(self, position)

    monkeypatch.setattr("data_tools.outputs.Outputs.seal", another_run)
    assert tokenize.main(command) == 0
    assert statuses == [1]
    assert "another process is writing" in caplog.text


def make_worker(setting):
    def work(item):
        if item == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return setting, item

    return work


def test_workers_keep_the_order_and_say_what_killed_them():
    with OrderedWorkers(2, make_worker, "s") as processes:
        assert list(processes.map(range(20))) == [(i, ("s", i)) for i in range(20)]
        with pytest.raises(WorkerError, match=r"died \(signal 9, Killed\) while it had: .*die"):
            list(processes.map(["a", "b", "c", "die", "d", "e"]))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_are_processes_when_they_are_many(num_workers, monkeypatch):
    max_threads = 2
    monkeypatch.setattr(workers, "MAX_THREADS", max_threads)
    with ordered_workers(num_workers, make_namer, "s") as name_process:
        found = list(name_process(range(40)))
    assert [item for item, _ in found] == [item for item, (_, item) in found] == list(range(40))
    processes = {process for _, (process, _) in found}
    assert processes == {os.getpid()} if num_workers <= max_threads else len(processes - {os.getpid()}) == num_workers


def make_namer(setting):
    return lambda item: (os.getpid(), item)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_threads_raise_a_fault_in_its_place_and_hold_few_items(num_workers, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    taken = []
    with ordered_workers(num_workers, make_divider, 12) as divide:
        results = divide(taken.append(item) or item for item in (1, 2, 3, 0, *range(4, 100)))
        assert [next(results) for _ in range(3)] == [(1, (12.0, "false")), (2, (6.0, "false")), (3, (4.0, "false"))]
        with pytest.raises(ZeroDivisionError):
            next(results)
    assert len(taken) <= 4 + 2 * num_workers
    # The library would use all cores with each worker; what the caller had set comes back.
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_threads_with_a_long_item_hold_up_no_interruption():
    """Ctrl-C while a document of many megabytes is tokenized: the call into the library cannot be stopped, nor must it be waited for."""
    before, release = threading.enumerate(), threading.Event()
    try:
        with pytest.raises(KeyboardInterrupt):
            _interrupt_after_the_first(release)
    finally:
        release.set()
    for thread in set(threading.enumerate()) - set(before):
        thread.join(10)
        assert not thread.is_alive()


def _interrupt_after_the_first(release):
    with ordered_workers(2, make_waiter, release) as wait:
        next(wait(item for item in ("short", "long", "long", "never", "never")))
        raise KeyboardInterrupt


def make_waiter(release):
    return lambda item: item == "short" or release.wait(LONGER_THAN_A_TEST)


def make_divider(setting):
    return lambda item: (setting / item, os.environ["TOKENIZERS_PARALLELISM"])


def test_duplicates_are_found_as_a_set_finds_them():
    generator, seen, known = random.Random(0), SeenHashes(), set()
    for _ in range(60):
        texts = [str(generator.randrange(5000)) for _ in range(generator.randrange(200))]
        expected = [text not in known and not known.add(text) for text in texts]
        assert seen.add(b"".join(map(hash_of, texts))).tolist() == expected
    # Entries with the same first word are told apart by the second.
    pairs = [bytes(8) + bytes([i]) + bytes(7) for i in (1, 2, 3)]
    for pair in pairs:
        assert seen.add(pair).tolist() == [True]
    assert seen.add(b"".join(pairs)).tolist() == [False] * 3


def test_a_dataset_is_inspected(corpus, tokenizer_file, tmp_path, capsys, caplog):
    prefix = tmp_path / "x"
    assert tokenize.main(["--input", str(corpus / "b0.txt"), "--tokenizer", str(tokenizer_file), "--output", str(prefix)]) == 0
    pages = ["--svg", str(tmp_path / "x.svg"), "--html", str(tmp_path / "x.html")]
    assert inspect.main([str(prefix), "--tokenizer", str(tokenizer_file), "--characters", "20", *pages]) == 0
    out = capsys.readouterr().out
    assert "def function_0(value" in out
    assert out.count("ok      ") == 3
    assert "<svg" in (tmp_path / "x.html").read_text()
    damaged = prefix.with_suffix(".bin")
    tokens = bytearray(damaged.read_bytes())
    tokens[100:102] = (14).to_bytes(2, "little")
    damaged.write_bytes(tokens)
    assert inspect.main([str(prefix)]) == 1
    assert "token 50 is the mask" in capsys.readouterr().out
    assert "is corrupt: its sha256" in caplog.text
