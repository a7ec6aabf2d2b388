"""The W&B dashboard: its definition, and its form in W&B's own package. The tests send nothing."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from w1train import dashboard
from w1train.reports.live_dashboard import SECTIONS, definition, workspace

needs_workspaces = pytest.mark.skipif(importlib.util.find_spec("wandb_workspaces") is None, reason="wandb-workspaces is not installed")


@needs_workspaces
def test_wandb_understands_every_panel():
    view = workspace("somebody", "a-project")._to_model()
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    sections = [section for section in spec["section"]["panelBankConfig"]["sections"] if section["panels"]]
    assert [section["name"] for section in sections] == [section.name for section in SECTIONS]
    for ours, theirs in zip(SECTIONS, sections, strict=True):
        for panel, made in zip(ours.panels, theirs["panels"], strict=True):
            assert made["viewType"] == "Run History Line Plot"
            assert (made["config"]["chartTitle"], tuple(made["config"]["metrics"])) == (panel.title, panel.metrics)
            assert made["config"].get("metricRegex") == panel.pattern
            assert made["config"].get("yLogScale", False) == panel.log
            assert made["config"]["xAxis"] == {"tokens": "tokens", "Step": "_step"}[panel.x]


@needs_workspaces
def test_it_is_created_with_a_key(monkeypatch):
    import wandb_workspaces.workspaces as workspaces

    saved = []
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setattr(workspaces.Workspace, "save", lambda self: saved.append((self.entity, self.project, self.name)))
    monkeypatch.setattr(workspaces.Workspace, "url", "an address")
    assert dashboard.create("somebody", "a-project") == "an address"
    assert saved == [("somebody", "a-project", "w1train")]


def test_without_a_key_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["dashboard"])
    with pytest.raises(SystemExit, match="WANDB_API_KEY is not set"):
        dashboard.main()


@needs_workspaces
def test_a_refusal_is_told(monkeypatch):
    import wandb_workspaces.workspaces as workspaces
    from wandb.errors import CommError

    def refuse(self):
        raise CommError("permission denied")

    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setattr(workspaces.Workspace, "save", refuse)
    with pytest.raises(dashboard.UserError, match="permission denied"):
        dashboard.create("somebody", "a-project")


@needs_workspaces
def test_an_unusable_variable_is_told_without_its_value(monkeypatch, capsys):
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "nobody:hunter2@localhost")
    monkeypatch.setattr(sys, "argv", ["dashboard", "--entity", "somebody"])
    try:
        with pytest.raises(SystemExit, match="W&B did not create the workspace: the setting base_url of W&B") as stopped:
            dashboard.main()
    finally:
        wandb.teardown()
    assert "hunter2" not in str(stopped.value)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(dashboard.UserError, match=r"pip install 'w1train\[dashboard\]'"):
        dashboard.create("somebody", "a-project")


def test_the_definition_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dashboard", "--print", "--project", "a-project"])
    dashboard.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(definition("a-project")))
    assert printed["project"] == "a-project"
