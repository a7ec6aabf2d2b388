"""No output replaces an input, and an existing file is replaced only on request, whatever the names are."""

from __future__ import annotations

import os

import pytest

from w1train.runtime.output_files import OutputError, require_apart, require_writable


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.json").write_text("text")
    return tmp_path / "in/a.json"


def link(target, name):
    os.symlink(target, name)
    return name


SPELLINGS = {
    "the same": lambda path: path,
    "relative": lambda path: "in/a.json",
    "with a dot": lambda path: "./in//../in/a.json",
    "a link": lambda path: link(path, "link.json"),
    "in a linked directory": lambda path: f"{link(path.parent, 'linked')}/a.json",
    "a hard link": lambda path: os.link(path, "hard.json") or "hard.json",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("overwrite", [True, False, None])
def test_an_input_is_never_replaced(corpus, spelling, overwrite):
    with pytest.raises(OutputError, match=r"is the input .*in/a\.json, which is never replaced"):
        require_writable(["new", spelling(corpus)], [corpus], overwrite=overwrite)


def test_an_input_behind_a_link_is_an_input(corpus):
    with pytest.raises(OutputError, match=r"is the input link\.json"):
        require_writable([corpus], [link(corpus, "link.json")], overwrite=True)


def test_names_that_differ_in_case_may_be_one_file(corpus, monkeypatch):
    stat = os.stat
    require_writable(["in/A.JSON"], [corpus], overwrite=True)
    monkeypatch.setattr("w1train.runtime.output_files.os.stat", lambda path: stat(str(path).replace("A.JSON", "a.json")))
    with pytest.raises(OutputError, match="is the input"):
        require_writable(["in/A.JSON"], [corpus], overwrite=True)


def test_names_while_a_file_is_written_are_no_inputs_either(tmp_path):
    source = tmp_path / "x.partial"
    source.write_text("text")
    with pytest.raises(OutputError, match="is the input"):
        require_writable([tmp_path / "x"], [source], overwrite=True)
    with pytest.raises(OutputError, match="is the input"):
        require_writable([tmp_path / "y"], [source], overwrite=True, also_written=[source])
    require_writable([tmp_path / "x"], [], overwrite=False)


def test_what_exists_is_replaced_on_request(tmp_path):
    paths = [tmp_path / name for name in ("a.bin", "b.html", "gone")]
    paths[0].touch()
    paths[1].symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"nothing was written: .*a\.bin, .*b\.html exist already: .*--overwrite"):
        require_writable(paths, [], overwrite=False)
    with pytest.raises(OutputError, match=r"a\.bin exists already: remove it or choose another name$"):
        require_writable(paths[:1], [], overwrite=None)
    require_writable(paths, [], overwrite=True)
    with pytest.raises(OutputError, match="is a directory"):
        require_writable([tmp_path], [], overwrite=True)


def test_two_outputs_are_two_files(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="are the same file"):
        require_writable([tmp_path / "x", tmp_path / "link/x"], [], overwrite=True)


def test_inputs_are_not_looked_at_for_new_outputs(tmp_path):
    def inputs():
        pytest.fail("a corpus of a million files would be looked through")
        yield

    require_writable([tmp_path / "new"], inputs(), overwrite=False)


def test_directories_that_are_emptied_hold_no_input(tmp_path):
    run = tmp_path / "run.partial"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    for output in (run, run / "checkpoints", run / "checkpoints/new/deep", tmp_path, tmp_path / "link"):
        with pytest.raises(OutputError, match="are not apart"):
            require_apart([tmp_path / "run", output], [run / "checkpoints"])
    require_apart([tmp_path / "run", run / "export"], [run / "checkpoints"])


@pytest.mark.parametrize("path", [".", "in/..", "/", ""])
def test_a_directory_without_a_name_is_refused(corpus, path):
    with pytest.raises(OutputError, match="is a directory"):
        require_writable([path], [corpus], overwrite=True)
