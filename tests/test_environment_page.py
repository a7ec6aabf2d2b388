"""docs/environment.md lists every environment variable that the sources read or set, and none that they do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.environment_variables import UnknownNameError, all_uses, in_dockerfile, in_makefile, in_python, in_shell

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ["w1train", "data_tools", "launch", "benchmarks", "docker"]
PAGE = REPOSITORY / "docs" / "environment.md"


def documented(text: str) -> dict[str, list[str]]:
    """Cells of each row of the page's tables by the name in the first, `NAME`."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    return {name: row for row in rows for name in re.findall(r"`([A-Z][A-Z0-9_]*)`", row[0])}


def test_the_page_and_the_sources_agree():
    places: dict[str, list[str]] = {}
    for use in all_uses(REPOSITORY, FOLDERS):
        places.setdefault(use.name, []).append(use.place)
    rows = documented(PAGE.read_text())
    undocumented = [f"{name}, used in {', '.join(places[name])}" for name in sorted(places.keys() - rows.keys())]
    unused = sorted(rows.keys() - places.keys())
    assert not undocumented, "add a row to a table of docs/environment.md (`NAME`, default, what it does) for:\n" + "\n".join(undocumented)
    assert not unused, f"no source uses it any more; remove its row from docs/environment.md: {', '.join(unused)}"


def test_each_row_says_what_it_does_and_where():
    for name, row in documented(PAGE.read_text()).items():
        assert len(row) == 3, f"{name}: name, default, what it does"
        assert len(row[2]) > 15, f"{name}: what does it do?"


def names(uses):
    return [use.name for use in uses]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nos.environ['ONE']\nos.environ.get('TWO', '')\nos.getenv('THREE')\n", ["ONE", "TWO", "THREE"]),
        (
            "import os\nif 'ONE' in os.environ or 'TWO' not in os.environ:\n    os.environ.setdefault('THREE', '1')\n",
            ["ONE", "TWO", "THREE"],
        ),
        (
            "import os\nos.environ['SET'] = 'x'\nos.environ.pop('GONE', None)\nf = f\"{os.environ['IN_TEXT']}\"\n",
            ["SET", "GONE", "IN_TEXT"],
        ),
        ("import os\nNAME = 'CONSTANT'\nos.environ[NAME]\n", ["CONSTANT"]),
        ("def f(environment):\n    return environment.get('SLURM_JOB_ID') or environment['HOME']\n", ["SLURM_JOB_ID", "HOME"]),
        ("def f(envelope):\n    return envelope['to'], config.get('KEY'), {}['KEY']\n", []),
        ("# os.environ['COMMENT']\ntext = \"os.environ['TEXT']\"\n", []),
    ],
)
def test_uses_in_python(source, expected):
    assert sorted(names(in_python(source, "a.py"))) == sorted(expected)


def test_a_computed_name_is_refused():
    with pytest.raises(UnknownNameError, match=r"a\.py:2"):
        list(in_python("import os\nos.environ['A' + suffix]\n", "a.py"))
    assert list(in_python("def f(environment, key):\n    return environment[key]\n", "a.py")) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('echo "$ONE ${TWO} ${THREE:-x} $(echo "${FOUR:+y}")"\n', ["ONE", "TWO", "THREE", "FOUR"]),
        ('OWN=1\necho "$OWN ${OWN}"\nfor ITEM in 1 2; do echo "$ITEM"; done\nread -r LINE; echo "$LINE"\n', []),
        ('VENV="${VENV:-.venv}"\n"$VENV/bin/python"\n', ["VENV"]),
        ('export ONE=1 TWO="${THREE:-A B=C}"\n', ["ONE", "TWO", "THREE"]),
        ('PAIR=1 command "$PAIR"\n', []),
        ('# $COMMENT\necho "${BASH_SOURCE[0]} $SECONDS $lower \\$ESCAPED" # $LATER\n', []),
        ('[[ -n "$IF" ]] && echo "${#LENGTH}"\n', ["IF", "LENGTH"]),
    ],
)
def test_uses_in_shell(source, expected):
    assert sorted(set(names(in_shell(source, "a.sh")))) == sorted(expected)


def test_what_a_script_gets_from_those_that_source_it_is_not_from_the_environment():
    assert names(in_shell('echo "$GIVEN $ASKED"\n', "a.sh", frozenset({"GIVEN"}))) == ["ASKED"]


def test_uses_in_makefiles_and_dockerfiles():
    assert names(in_makefile("ONE ?= 1\nOWN := 2\nall:\n\t@$(ONE) $(OWN) $(TWO) $(MAKE)  # $(THREE)\n", "Makefile")) == [
        "ONE",
        "ONE",
        "TWO",
    ]
    text = "ARG NOT_THIS=1\nENV ONE=1 \\\n    TWO=2\nRUN THREE=3 command \\\n    FOUR=4\nENV FIVE=${FIVE}:6\n"
    assert names(in_dockerfile(text, "Dockerfile")) == ["ONE", "TWO", "FIVE"]


def test_documented_names_are_found():
    text = "| name | default | what |\n|---|---|---|\n| `ONE`, `TWO` | 1 | `NOT_THIS` |\n\n`NOR_THIS` in words\n"
    assert set(documented(text)) == {"ONE", "TWO"}
