"""Files of a run directory that somebody else has written: every command that reads one says what is wrong with it, and ends."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.end_to_end.runs import TinyRun
from tests.hostile.commands import (
    Main,
    answer,
    make_dataset,
    make_run,
    may_refuse,
    require_refusal,
    run_config,
    status_main,
    write_checkpoint,
)
from tests.hostile.content import NOT_CONFIGURATIONS, NOT_FILES, NOT_JSON_OBJECTS, Content, as_json, put
from tests.hostile.test_data_files import mutated, swapped
from tests.reports.fake_run import sample_record, train_record, validation_record
from tests.slow import examples
from w1train import average, convert, evaluate, report, sample
from w1train.checkpoints.recovery import _is_to_return
from w1train.config.errors import UserError
from w1train.config.serialization import config_from_yaml, config_to_yaml
from w1train.evaluation import averages
from w1train.reports.report_compare import write_comparison
from w1train.reports.run_report import write_report
from w1train.runtime.megatron_on_cpu import import_megatron
from w1train.status import describe_run

import_megatron()

from w1train.evaluation.checkpoint_validation import require_own  # noqa: E402 - the line above has to come first

MARKUP = "<script>alert(1)</script>"

MODEL_COMMANDS: dict[str, tuple[Main, list[str]]] = {
    "sample": (sample.main, []),
    "evaluate": (evaluate.main, []),
    "average": (average.main, ["--steps", "4,8", "--no-evaluate"]),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def run(template, tmp_path):
    """A run to damage."""
    return shutil.copytree(template, tmp_path / "run")


@pytest.fixture(autouse=True)
def _no_process_group(monkeypatch):
    """Averaging would open one in the process of all tests."""
    for name in ("initialize_process_group", "select_device", "redirect_cuda_to_cpu"):
        monkeypatch.setattr(averages, name, lambda *_: None)


def refused(run: Path, name: str, capture: pytest.CaptureFixture[str]) -> str:
    main, options = MODEL_COMMANDS[name]
    return require_refusal(main, [str(run), *options], capture, 2)


SOME = ("list", "billion laughs", "wrong types")
"""Where the command is what differs: the other contents come through the same door."""


@pytest.mark.parametrize("content", [name for name in NOT_CONFIGURATIONS if name not in ("pipe", "directory")])
def test_a_configuration(run, content, capsys):
    put(run / "config.yaml", NOT_CONFIGURATIONS[content])
    for command in MODEL_COMMANDS if content in SOME else ["sample"]:
        assert str(run / "config.yaml") in refused(run, command, capsys)
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", SOME)
def test_the_configuration_of_a_checkpoint(run, content, capsys):
    text = NOT_CONFIGURATIONS[content]
    assert isinstance(text, bytes)
    checkpoint = write_checkpoint(run, 8, text.decode())
    arguments = ["to-hf", str(run), str(run.parent / "exported")]
    require_refusal(convert.main, arguments, capsys, 2, str(checkpoint / "config.yaml"))


LARGE_MODELS = {
    "a million layers": {"num_layers": 1_000_000},
    "a vocabulary of 10^12": {"vocab_size": 10**12},
    "many parameters within the ranges": {"num_layers": 4096, "hidden_size": 1 << 20, "ffn_hidden_size": 1 << 20, "vocab_size": 1 << 24},
    "a large vocabulary": {"vocab_size": 1 << 24},
    "a wide condition": {"condition_size": 1 << 20},
}


@pytest.mark.parametrize("model", LARGE_MODELS)
def test_a_model_that_its_checkpoint_cannot_hold(run, model, capsys):
    config = run_config()
    for name, value in LARGE_MODELS[model].items():
        setattr(config.model, name, value)
    text = config_to_yaml(config)
    (run / "config.yaml").write_text(text)
    for step in (4, 8):
        write_checkpoint(run, step, text)
    # Averaging builds no model: it takes tensors as they are.
    for command in ("sample", "evaluate"):
        assert "config.yaml" in refused(run, command, capsys)
    require_refusal(convert.main, ["to-hf", str(run), str(run.parent / "exported")], capsys, 2, "config.yaml")


@pytest.mark.parametrize("url", ["file://{}/x", "reference::http://localhost:1/x", "memory://x"])
@pytest.mark.parametrize("is_further", [False, True])
def test_nothing_is_fetched_because_a_run_says_so(run, tmp_path, url, is_further, capsys, monkeypatch):
    make_dataset(tmp_path / "x")
    config, url, cache = run_config(), url.format(tmp_path), tmp_path / "somewhere/cache"
    config.data.validation, config.data.cache_directory = str(tmp_path / "x") if is_further else url, str(cache)
    config.data.validation_sets = {"further": url} if is_further else {}
    (run / "config.yaml").write_text(config_to_yaml(config))
    model = SimpleNamespace(config=config_from_yaml(run / "config.yaml"), checkpoint=run / "checkpoints/step_0000000004")
    monkeypatch.setattr("w1train.inference.predictor.load_for_inference", lambda *_: model)
    require_refusal(average.main, [str(run), "--steps", "4,8"], capsys, 2, url, "Give the dataset with --validation")
    require_refusal(evaluate.main, [str(run)], capsys, 2, url, "Give the dataset with --validation")
    assert not cache.parent.exists()
    require_own(model.config.data, url)


TOKENIZERS: dict[str, Content] = {
    **NOT_JSON_OBJECTS,
    "no model": as_json({"version": "1.0"}),
    "unknown model": as_json({"version": "1.0", "model": {"type": "Oracle", "vocab": {}, "merges": []}}),
}


@pytest.mark.parametrize("content", TOKENIZERS)
def test_a_tokenizer(run, content, capsys, monkeypatch):
    # The checkpoint of this run has no weights, which would be found first.
    monkeypatch.setattr("w1train.inference.predictor.require_stored", lambda *_: None, raising=False)
    put(run / "tokenizer.json", TOKENIZERS[content])
    for command in ("sample", "evaluate") if content == "list" else ["sample"]:
        assert str(run / "tokenizer.json") in refused(run, command, capsys)


STATUSES: dict[str, Content] = {
    **NOT_JSON_OBJECTS,
    "no fields": b"{}",
}


@pytest.mark.parametrize("content", STATUSES)
def test_a_status(run, content, capsys):
    put(run / "status.json", STATUSES[content])
    require_refusal(status_main, [str(run)], capsys, 2, str(run), "status.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"world_size": "many"},
        {"step": None},
        {"num_steps": -1},
        {"tokens": [1]},
        {"time": "now"},
        {"time": float("nan")},
        {"state": ["running"]},
        {"state": "dancing"},
        {"host": {"a": 1}},
        {"message": 7},
        {"pid": True},
        {"step": 10**30},
        {"extra": 1},
    ],
)
def test_a_status_of_other_values(run, changes, capsys):
    path = run / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    require_refusal(status_main, [str(run)], capsys, 2, str(run), "status.json")


def test_a_status_that_asks_for_too_much(run, capsys):
    path = run / "status.json"
    values = {**json.loads(path.read_text()), "world_size": 10**18, "message": "\x1b[2J" + "x" * 100_000}
    path.write_text(json.dumps(values))
    found, said = answer(status_main, [str(run)], capsys)
    assert found == 3
    assert "\x1b" not in said
    assert len(said) < 5000
    path.write_text(json.dumps({**values, "host": socket.gethostname(), "pid": 10**15}))
    assert answer(status_main, [str(run)], capsys)[0] == 1


@pytest.mark.parametrize("content", NOT_JSON_OBJECTS)
def test_a_heartbeat_is_left_out(run, content, capsys):
    put(run / "heartbeats/rank_00000.json", NOT_JSON_OBJECTS[content])
    found, said = answer(status_main, [str(run)], capsys)
    assert (found, "Traceback" in said) == (3, False)


def line(record: object) -> bytes:
    return as_json(record) + b"\n"


TRAINED = line(train_record(1))
LINES: dict[str, bytes] = {
    **{name: content + b"\n" for name, content in NOT_JSON_OBJECTS.items() if isinstance(content, bytes) and name != "empty"},
    "no step": line({"kind": "train"}),
    "text as a step": line({"kind": "train", "step": "1"}),
    "a boolean as a step": line({"kind": "train", "step": True}),
    "a step of 40 digits": line({"kind": "train", "step": 10**39}),
    "a negative step": line({"kind": "train", "step": -1}),
    "nonfinite of nothing": line({"step": 1, "nonfinite": {"loss": "nan"}}),
    "nonfinite beyond a list": line({"step": 1, "loss_by_t": [1], "nonfinite": {"loss_by_t/7": "nan"}}),
    "nonfinite that is a list": line({"step": 1, "nonfinite": ["loss"]}),
    "nonfinite that is text": line({"step": 1, "loss": None, "nonfinite": {"loss": "much"}}),
    "seventeen megabytes": b'{"step": 1, "kind": "' + b"x" * (17 << 20) + b'"}\n',
}


@pytest.mark.parametrize("content", LINES)
def test_a_line(run, content, capsys):
    for name in ("events.jsonl", "samples.jsonl", "metrics.jsonl") if content == "list" else ["metrics.jsonl"]:
        (run / name).write_bytes(TRAINED + LINES[content] + TRAINED)
        require_refusal(report.main, [str(run)], capsys, 2, str(run / name))


METRICS = {
    **{f"text as {key}": {**train_record(1), key: "much"} for key in ("loss", "elbo", "tokens", "grad_norm", "time/mfu", "learning_rate")},
    **{f"a list as {key}": {**train_record(1), key: [1]} for key in ("loss", "tokens", "time/step_seconds", "block_size")},
    **{f"a number as {key}": {**train_record(1), key: 1} for key in ("loss_by_t",)},
    "texts in loss_by_t": {**train_record(1), "loss_by_t": ["a"]},
    "no tokens": {name: value for name, value in train_record(1).items() if name != "tokens"},
    "text as a validation's ELBO": {**validation_record(1), "elbo": "low"},
    "an average of nothing": {"kind": "average", "step": 1},
    "an average by an unknown metric": {"kind": "average", "step": 1, "metric": "x", "members": [1], "best_member": 1, "is_better": True},
}


@pytest.mark.parametrize("content", METRICS)
def test_metrics_of_other_types(run, template, content, capsys):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line(METRICS[content]))
    require_refusal(report.main, [str(run)], capsys, 2, str(path))
    require_refusal(report.main, [str(template), str(run), "--output", str(run / "c.html")], capsys, 2, str(path))


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("samples.jsonl", {"step": 1, "tokens": 1}),
        ("samples.jsonl", {"step": 1, "tokens": 1, "prompt": 1, "text": "a"}),
        ("samples.jsonl", {"step": 1, "tokens": "a", "prompt": "a", "text": "a"}),
        ("events.jsonl", {"step": 1}),
        ("events.jsonl", {"step": 1, "event": ["start"]}),
    ],
)
def test_other_records_of_other_types(run, name, record, capsys):
    (run / name).write_bytes(line(record))
    require_refusal(report.main, [str(run)], capsys, 2, str(run / name))


@pytest.mark.parametrize("content", NOT_JSON_OBJECTS)
def test_a_summary(run, content, capsys):
    put(run / "summary.json", NOT_JSON_OBJECTS[content])
    require_refusal(report.main, [str(run)], capsys, 2, str(run / "summary.json"))


@pytest.mark.parametrize(
    "changes",
    [{"num_parameters": "1"}, {"wall_seconds": float("inf")}, {"versions": [1]}, {"versions": {"git_commit": 7}}, {"steps": [1]}],
)
def test_a_summary_of_other_types(run, changes, capsys):
    path = run / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    require_refusal(report.main, [str(run)], capsys, 2, str(path))


@pytest.mark.parametrize("content", [name for name in NOT_CONFIGURATIONS if name not in ("unknown keys",)])
def test_a_configuration_in_a_report(run, content, capsys):
    """A page shows any mapping: only what cannot be read at all is refused."""
    put(run / "config.yaml", NOT_CONFIGURATIONS[content])
    found, said = answer(report.main, [str(run)], capsys)
    mappings = ("wrong types", "a key that steers the terminal", "not a number", "text where numbers are", "a Python object")
    assert "Traceback" not in said
    assert found == 2 or content in mappings
    assert found == 0 or str(run / "config.yaml") in said
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "events.jsonl"])
@pytest.mark.parametrize("content", NOT_FILES)
def test_records_that_are_no_files(run, name, content, capsys):
    (run / name).unlink()
    put(run / name, NOT_FILES[content])
    require_refusal(report.main, [str(run)], capsys, 2, str(run / name))


def test_a_page_holds_any_numbers_and_no_markup(run, template, capsys):
    numbers = [1e308, -1e308, 5e-324, 0.0, float("nan"), float("inf"), 10**39, None]
    with (run / "metrics.jsonl").open("ab") as file:
        for step, number in enumerate(numbers, start=30):
            values = dict.fromkeys(("loss", "elbo", "elbo_bits_per_byte", "grad_norm", "learning_rate", "time/mfu", "other"), number)
            file.write(line({**train_record(step), **values, "stage": MARKUP, MARKUP: 1.0, "block_size": step % 2}))
            file.write(line({**validation_record(step), "tokens": 7, **values}))
    (run / "samples.jsonl").write_bytes(line({**sample_record(1), "prompt": MARKUP, "text": MARKUP + "<|mask|>" + MARKUP}))
    (run / "events.jsonl").write_bytes(line({"step": 1, "event": MARKUP}) + line({"step": 2, "event": "start"}))
    summary = {**json.loads((run / "summary.json").read_text()), "device": MARKUP, "unigram_bits_per_byte": 0, "name": MARKUP}
    (run / "summary.json").write_text(json.dumps({**summary, "versions": {"git_commit": MARKUP, MARKUP: MARKUP}}))
    (run / "config.yaml").write_text(f"name: {MARKUP}\n'{MARKUP}': '{MARKUP}'\nvalidation: [1]\n")
    other = shutil.copytree(template, run.parent / MARKUP.replace("/", "|"))
    assert answer(report.main, [str(run)], capsys)[0] == 0
    assert answer(report.main, [str(run), "--compare", str(other), "--overwrite"], capsys)[0] == 0
    assert answer(report.main, [str(run), str(other), "--output", str(run / "c.html")], capsys)[0] == 0
    for page in (run / "report.html", run / "c.html"):
        assert "<script>alert" not in page.read_text()


@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_any_damage_of_a_run_is_its_error(template, tmp_path_factory, data):
    run = shutil.copytree(template, tmp_path_factory.mktemp("fuzz") / "run")
    names = ("metrics.jsonl", "samples.jsonl", "events.jsonl", "summary.json", "config.yaml", "status.json", "heartbeats/rank_00000.json")
    path = run / data.draw(st.sampled_from(names))
    lines = path.read_bytes().splitlines(keepends=True)
    if path.suffix == ".jsonl" and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(lines) - 1))
        lines[place] = line(swapped(json.loads(lines[place]), data.draw))
        path.write_bytes(b"".join(lines))
    elif path.suffix == ".json" and data.draw(st.booleans()):
        path.write_bytes(as_json(swapped(json.loads(path.read_bytes()), data.draw)))
    else:
        path.write_bytes(mutated(path.read_bytes(), data.draw))
    with may_refuse(UserError, str(path)):
        write_report(run)
        write_comparison([template, run], run / "c.html")
    text, _ = describe_run(run)
    assert text.isprintable()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_change_of_a_configuration_is_its_error(template, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    tree = yaml.safe_load((template / "config.yaml").read_text())
    if data.draw(st.booleans()):
        path.write_text(yaml.safe_dump(swapped(tree, data.draw)))
    else:
        path.write_bytes(mutated((template / "config.yaml").read_bytes(), data.draw))
    with may_refuse(UserError, str(path)):
        config_from_yaml(path)


def test_the_note_of_the_step_that_was_returned_to_is_a_small_file(tmp_path):
    note = tmp_path / ".resume_step"
    note.write_text("7")
    assert not _is_to_return(tmp_path, 7)
    note.write_bytes(b"\xff" * ((1 << 20) + 1))
    with pytest.raises(UserError, match=r"\.resume_step is too large"):
        _is_to_return(tmp_path, 7)
    note.unlink()
    os.mkfifo(note)
    with pytest.raises(UserError, match=r"\.resume_step is not a regular file"):
        _is_to_return(tmp_path, 7)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "checkpoints/step_0000000012/config.yaml", "status.json"])
def test_a_run_that_is_resumed(undisturbed, tmp_path, name):
    """Training reads these files of an earlier start."""
    whole = undisturbed(1, "fp32")
    run = TinyRun(whole.data, tmp_path / "runs")
    shutil.copytree(whole.path, run.path)
    path = run.path / name
    content = b"[" * 10_000 + b"\n" if name != "summary.json" else b'{"steps": []}'
    path.write_bytes(content + (path.read_bytes() if path.suffix == ".jsonl" else b""))
    if name == "metrics.jsonl":
        (run.path / "summary.json").unlink()  # by which a run is known to have nothing left to do
    if path.suffix == ".yaml":
        # Whoever writes the file writes the manifest's word about it.
        manifest = json.loads((path.parent / "manifest.json").read_bytes())
        manifest["files"]["config.yaml"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
    outcome = run.train("training.precision=fp32")
    assert "Traceback" not in outcome.output, outcome.output[-3000:]
    if name == "status.json":
        outcome.require(0)
    else:
        outcome.require(2)
        assert str(path) in outcome.output
