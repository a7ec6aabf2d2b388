"""The records of a run that was started twice: W&B's and TensorBoard's files, the dashboard, events, and the page that explains the
metrics."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from concurrent.futures import wait
from pathlib import Path
from statistics import median

import pytest

from tests.end_to_end.runs import BATCH, LENGTH, NUM_STEPS, TinyRun
from tests.records.wandb_file import read_history, read_run
from w1train.checkpoints import saver as saver_module
from w1train.records.chart_metrics import chart_metrics
from w1train.records.summary import code_versions
from w1train.reports.live_dashboard import SECTIONS
from w1train.runtime.record_files import read_metrics
from w1train.training import forward

REPOSITORY = Path(__file__).parents[2]
# The metrics that users expect by name.
NAMED = {
    *("loss", "elbo", "loss_by_t/0.95", "grad_norm", "mfu", "tokens_per_second", "data_wait_seconds", "communication_seconds"),
    *("memory_gib", "context_balance", "phase"),
}
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
FIRST_STEPS = 6


def waiting_for_writers(rank: int) -> None:
    """Make each step boundary wait for the writing of a save: on a slow disk, a save may otherwise last beyond the run's last record, which
    then has no times of it."""
    poll = saver_module.CheckpointSaver.poll

    def wait_and_poll(saver: saver_module.CheckpointSaver) -> None:
        if saver._save is not None:
            wait([saver._save.work], timeout=60)
        poll(saver)

    saver_module.CheckpointSaver.poll = wait_and_poll


@pytest.fixture(scope="module")
def watched(tiny_data, tmp_path_factory) -> TinyRun:
    """Six steps, and on a second start six more, with every metric switched on that a run can have."""
    run = TinyRun(tiny_data, tmp_path_factory.mktemp("watched"))
    for num_steps in (FIRST_STEPS, NUM_STEPS):
        run.train(
            f"logging={{wandb: offline, peak_tflops: 1.0, tensorboard: {'true' if HAS_TENSORBOARD else 'false'}}}",
            "parallel={context: 2, context_chunk_size: 8}",
            "health.straggler_interval=4",
            f"schedule.stages.stable.tokens={(num_steps - 2) * BATCH * LENGTH}",
            world_size=2,
            sabotage=waiting_for_writers,
        ).require(0)
    # W&B's own process writes the files, on a busy machine a moment after finish() has returned.
    deadline = time.monotonic() + 30
    while set(read_history(run.path)) != set(range(NUM_STEPS + 1)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return run


def test_wandb_has_every_metric_of_every_record(watched):
    history = read_history(watched.path)
    records = read_metrics(watched.path / "metrics.jsonl")
    assert {record["step"] for record in records} == set(range(NUM_STEPS + 1))
    for record in records:
        for name, value in chart_metrics(record, [0.25, 0.75], ("warmup", "stable")).items():
            assert history[record["step"]][name] == value, name
    for step in range(1, NUM_STEPS + 1):
        # A step of 256 tokens may have no tokens in a bin of t; the whole run may not.
        assert (NAMED - {"loss_by_t/0.95"}) <= history[step].keys()
    assert set().union(*history.values()) >= NAMED
    assert [history[step]["phase"] for step in (1, 2, 3)] == [1, 1, 2]
    assert all(history[step]["samples/_type"] == "table-file" for step in (FIRST_STEPS, NUM_STEPS))


def test_the_dashboard_shows_what_a_run_writes(watched):
    written = set().union(*read_history(watched.path).values())
    panels = [panel for section in SECTIONS for panel in section.panels]
    named = {name for panel in panels for name in panel.metrics}
    assert named >= {name for name in NAMED if not name.startswith("loss_by_t/")}
    assert {name for name in named if not name.startswith("experts/")} <= written, "a dense run has no metrics of experts"
    for panel in panels:
        assert panel.x == "Step" or panel.x in written
        assert bool(panel.metrics) != bool(panel.pattern)
        assert panel.pattern is None or any(re.search(panel.pattern, name) for name in written), panel.pattern


def test_a_restart_goes_on_with_the_same_wandb_run(watched):
    runs = read_run(watched.path)
    assert len(list(watched.path.glob("wandb/offline-run-*"))) == 2
    assert {run.run_id for run in runs} == {(watched.path / "wandb_run_id").read_text().strip()}


def test_configuration_and_code_are_attached(watched):
    configs = [{item.key: json.loads(item.value_json) for item in run.config.update} for run in read_run(watched.path)]
    configs = [config for config in configs if "name" in config]
    assert len(configs) == 2
    for config, num_steps in zip(configs, (FIRST_STEPS, NUM_STEPS), strict=True):
        assert config["model.num_layers"] == 2
        assert config["schedule.stages.stable.tokens"] == (num_steps - 2) * BATCH * LENGTH
        for name, value in code_versions().items():
            assert config[f"versions.{name}"] == value


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
def test_tensorboard_has_the_same(watched):
    from tests.records.test_tensorboard import read_scalars

    scalars = read_scalars(watched.path)
    for record in read_metrics(watched.path / "metrics.jsonl"):
        for name, value in chart_metrics(record, [0.25, 0.75], ("warmup", "stable")).items():
            assert scalars[name][record["step"]] == pytest.approx(value, rel=1e-6), name


def test_events(watched):
    events = read_metrics(watched.path / "events.jsonl")
    expected = [("start", 0), ("checkpoint", 3), ("checkpoint", 6), ("resume", 6), ("checkpoint", 9), ("checkpoint", 12)]
    assert [(event["event"], event["step"]) for event in events] == expected
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert events[3]["world_size"] == 2


def documented() -> dict[str, str | None]:
    """Return {key of metrics.jsonl: W&B name} of the tables in docs/watching.md."""
    page = (REPOSITORY / "docs" / "watching.md").read_text().partition("## Training records")[2]
    rows = re.findall(r"^\| `([^`]+)` \| (?:`([^`]+)`)?", page, re.MULTILINE)
    return {key: name or None for key, name in rows}


def test_the_page_explains_every_metric_of_a_run(watched):
    """The page has every metric under its names in metrics.jsonl and W&B. Its other metrics are those of blends, of
    terms that the run's loss does not have, and of experts."""
    prefixes, found = {"train": "", "validation": "validation/"}, {}
    for record in read_metrics(watched.path / "metrics.jsonl"):
        kind = record["kind"]
        for key in record.keys() - ({"kind", "step", "tokens", "stage", "block_size"} if kind == "validation" else set()):
            if record[key] is not None:
                names = chart_metrics({"kind": kind, key: record[key]}, [0.25, 0.75], ("warmup", "stable")).keys() - {None}
                first = f"{prefixes[kind]}loss_by_t/{'0.25' if kind == 'validation' else '0.05'}"
                found[prefixes[kind] + key] = first if key == "loss_by_t" else next(iter(names), None)
    page = documented()
    assert {key: page.get(key, "not on the page") for key in found} == found
    others = {key for key in page.keys() - found.keys() if not key.startswith("experts/")}
    assert others == {
        *("corpus_tokens/NAME", "corpus_epochs/NAME", "cross_entropy_of_every_token", "masked_accuracy", "entropy_of_correct")
    }
    assert not any("experts/" in key for key in found), "a dense run says nothing of experts"


def delayed_on_the_other_rank(rank: int) -> None:
    next_inputs = forward._next_inputs

    def slowly(*arguments):
        time.sleep(0.15 if rank == 1 else 0.0)
        return next_inputs(*arguments)

    forward._next_inputs = slowly


@pytest.mark.slow
def test_waiting_for_a_slow_rank_is_communication(tiny_run):
    """Rank 0, which records, waits in the gradients' reduction for rank 1, which is late at each micro-batch."""
    tiny_run.train("training.micro_batch_size=4", "sampling.interval=0", world_size=2, sabotage=delayed_on_the_other_rank).require(0)
    records = read_metrics(tiny_run.path / "metrics.jsonl", kind="train")
    assert all(record["time/communication_seconds"] <= record["time/step_seconds"] for record in records)
    # At some steps, a busy machine may delay rank 0 as long.
    communication, data_wait = (median(record[f"time/{part}_seconds"] for record in records) for part in ("communication", "data_wait"))
    assert communication > 0.1
    assert communication > data_wait
