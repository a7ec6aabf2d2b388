"""The prose of the project keeps the rules of docs/writing.md, and the linter finds what breaks them."""

import ast

import pytest

from tests import prose


def test_the_project_is_written_in_plain_english():
    problems = [problem for path in prose.all_files() for problem in prose.problems(path)]
    assert not problems, "\n".join(map(str, problems))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Return the newest checkpoint; no rank has failed.", []),
        ("The attention annealing is `none`, and the option is ``none``.", []),
        ('The message is "there is none".', []),
        ("There is none of them.", ["is none"]),
        ("The old file\nand the new one", ["the new one"]),
        ("A value that is no number is written as null.", ["is no number"]),
        ("If so, the run stops.", ["If so"]),
        ("It stays so.", ["stays so"]),
        ("Save it. Called on\nevery rank. Returns the path.", ["Called on", "Returns the"]),
        ("Called functions are listed.\n\nReturns:\n    The path.", []),
    ],
)
def test_phrases_are_found(text, found):
    assert [problem.partition("'")[2].partition("'")[0] for _, problem in prose.phrase_problems(text)] == found


def test_the_line_of_a_phrase_is_given():
    assert [line for line, _ in prose.phrase_problems("First line.\nThere is\nnone here.")] == [1]


@pytest.mark.parametrize(
    ("source", "is_wrong"),
    [
        ('def f():\n    """Return it."""', False),
        ('def f():\n    """The newest checkpoint."""', True),
        ('def f():\n    """Args:\n        x: y."""', False),
        ('@property\ndef f():\n    """The newest checkpoint."""', False),
        ('class C:\n    """Sums over a micro-batch."""', False),
        ('class C:\n    """What holds a model."""', True),
        ('"""What a model is."""', True),
        ('"""A model."""', False),
    ],
)
def test_the_first_word_of_a_docstring_is_checked(source, is_wrong):
    tree = ast.parse(source)
    node = tree if isinstance(tree.body[0], ast.Expr) else tree.body[0]
    assert bool(list(prose.docstring_problems(node, ast.get_docstring(node)))) == is_wrong


def test_comments_messages_and_docstrings_are_read(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""The list has none."""\n\nx = 1  # here is none\nraise ValueError("none is left")\n')
    assert [problem.line for problem in prose.problems(path)] == [1, 3, 4]


def test_no_docstring_begins_with_whether(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('class C:\n    x: bool\n    """Whether it is on."""\n    y: bool\n    """Tell whether it is on."""\n')
    assert [problem.line for problem in prose.problems(path)] == [3]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("Words:\n\n| a | b |\n|---|---:|\n| 1 | 2 |\n", []),
        ("   | a | b |\n   | :--- | --- |\n", []),
        ("| a |\n|---|\n", []),
        ("Words:\n\n   | a | b | |---|---| | 1 |\n   2 |\n", [2]),
        ("| a | b |\n|---|---| | 1 | 2 |\n", [1]),
        ("| a | |---|\n", [0]),
        ("The row `|---|` of a table.\n\n```\na |---| b\n```\n", []),
    ],
)
def test_a_table_that_was_wrapped_into_a_paragraph_is_found(text, lines):
    assert [line for line, _ in prose.table_problems(text)] == lines


def test_tables_of_pages_are_read(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Words\n\n| word | meaning | |---|---| | step | one update\nof the weights |\n")
    assert [problem.line for problem in prose.problems(path)] == [3]
