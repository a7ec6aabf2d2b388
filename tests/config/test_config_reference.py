"""docs/configuration.md is up to date with the schema, in which every field has a docstring."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from w1train.config import schema
from w1train.config.schema_reference import field_docstrings, main, reference

ROOT = Path(__file__).parents[2]
CLASSES = [cls for name, cls in inspect.getmembers(schema, dataclasses.is_dataclass) if name.endswith("Config")]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_docstring(cls: type) -> None:
    docstrings = field_docstrings(cls)
    sections = {field.name for field in dataclasses.fields(cls) if str(field.type).endswith("Config")}
    assert {field.name for field in dataclasses.fields(cls)} - sections == set(docstrings)
    assert all(docstrings.values())


def test_the_committed_reference_is_up_to_date(tmp_path: Path) -> None:
    main([str(tmp_path / "configuration.md")])
    expected = (tmp_path / "configuration.md").read_text(encoding="utf-8")
    assert expected == reference()
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == expected, "run: python -m w1train.config.schema_reference docs/configuration.md"


def test_help_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert list(tmp_path.iterdir()) == []
