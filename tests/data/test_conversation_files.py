"""The command that makes datasets of conversations: its files, what it leaves out and counts, and what it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from data_tools import conversations, inspect
from tests.data.chat_templates import CHATML, END, START
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.dataset_manifest import DatasetManifest

ROWS = [
    {"prompt": "sort 3 1 2", "response": "1 2 3"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"input_ids": [20, 21, 1], "prompt_lengths": 1},
]
PAIRS = [{"prompt": f"number {i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return path


@pytest.fixture
def run(tokenizer_file, tmp_path):
    """Write rows to a file, and run the command on it."""

    def run(rows, *options, status=0) -> TokenDataset | None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        arguments = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tokenizer_file), "--output", str(tmp_path / "x"), *options]
        assert conversations.main(arguments) == status
        left = {path.name for path in tmp_path.iterdir() if path.name.startswith("x.")}
        if status:
            assert left == set(), "an error leaves no file"
            return None
        return TokenDataset.open(tmp_path / "x")

    return run


def texts(dataset, tokenizer) -> list[tuple[str, str]]:
    """Return the prompt and the reply of each document, whose replies are at its end."""
    found = []
    for number in range(dataset.num_documents):
        first, end = dataset.document_offsets[number], dataset.document_offsets[number + 1]
        ids, flags = dataset.read(first, end), dataset.read_may_be_noised(first, end)
        assert not np.any(flags[:-1] & ~flags[1:]), "one reply, to the end"
        found.append((tokenizer.decode(ids[~flags]), tokenizer.decode(ids[flags])))
    return found


def test_a_dataset_of_conversations(run, tokenizer, tmp_path):
    dataset = run(ROWS)
    assert texts(dataset, tokenizer) == [
        ("user:\nsort 3 1 2<eos>assistant:\n", "1 2 3<eos>"),
        ("user:\na<eos>assistant:\nb<eos>user:\na<eos>assistant:\n", "b<eos>"),
        ("user:\nadd\n1 2<eos>assistant:\n", "3<eos>"),
        (tokenizer.decode([20]), tokenizer.decode([21, 1])),
    ]
    manifest = json.loads((tmp_path / "x.json").read_text())
    lengths = np.diff(dataset.document_offsets)
    expected = {"kind": "conversations", "replies": "last", "longest": max(lengths), "num_rows": 4, "max_length": None}
    assert expected.items() <= manifest["conversations"].items()
    assert len(manifest["conversations"]["template_sha256"]) == 64
    assert manifest["num_tokens"] == sum(lengths)
    assert manifest["corpus"]["num_documents"] == 4
    dataset.verify_hashes()


def test_replies_split_and_all(run, tokenizer, tmp_path):
    split = texts(run(ROWS[1:2], "--replies", "split"), tokenizer)
    first = "user:\na<eos>assistant:\n"
    assert split == [(first, "b<eos>"), (f"{first}b<eos>{first}", "b<eos>")]
    every = run(ROWS[1:2], "--replies", "all", "--overwrite")
    flags = every.read_may_be_noised(0, every.num_tokens)
    assert tokenizer.decode(every.read(0, every.num_tokens)[flags]) == "b<eos>b<eos>"
    assert json.loads((tmp_path / "x.json").read_text())["conversations"]["replies"] == "all"


def test_pairs_stay_together(run, tokenizer, tmp_path):
    dataset = run([*PAIRS, {"prompt": "long", "chosen": "good", "rejected": "very " * 20}], "--max-length", "60", "--workers", "3")
    expected = [(f"user:\nnumber {i}<eos>assistant:\n", f"{reply}<eos>") for i in range(6) for reply in (f"good {i}", "bad")]
    assert texts(dataset, tokenizer) == expected
    counts = json.loads((tmp_path / "x.json").read_text())["conversations"]
    assert (counts["kind"], counts["num_too_long"], counts["num_without_other_side"], counts["num_rows"]) == ("preferences", 1, 1, 7)


def test_validation_has_whole_pairs_and_prompts(run, tokenizer, tmp_path):
    dataset = run([*PAIRS, *PAIRS], "--validation-output", str(tmp_path / "held"), "--validation-fraction", "0.5")
    sides = [texts(dataset, tokenizer), texts(TokenDataset.open(tmp_path / "held"), tokenizer)]
    assert sum(map(len, sides)) == 24
    assert {prompt for prompt, _ in sides[0]}.isdisjoint({prompt for prompt, _ in sides[1]})
    assert all(side[0::2] != [] and [p for p, _ in side[0::2]] == [p for p, _ in side[1::2]] for side in sides)


def test_a_cut_reply_has_no_end(run, tokenizer, tmp_path, capsys, caplog):
    rows = [ROWS[0], {"prompt": "sort", "response": "0 1 2 3 4 5 6 7 8 9"}, {"prompt": "long " * 9, "response": "a"}]
    dataset = run(rows, "--max-length", "36", "--too-long", "cut")
    assert texts(dataset, tokenizer)[0] == ("user:\nsort 3 1 2<eos>assistant:\n", "1 2 3<eos>")
    prompt, reply = texts(dataset, tokenizer)[1]
    assert (prompt, "0 1 2 3 4 5 6 7 8 9".startswith(reply), len(np.diff(dataset.document_offsets))) == (
        "user:\nsort<eos>assistant:\n",
        True,
        2,
    )
    assert np.diff(dataset.document_offsets)[1] == 36
    counts = json.loads((tmp_path / "x.json").read_text())["conversations"]
    assert (counts["num_cut"], counts["num_prompt_too_long"], counts["longest"]) == (1, 1, 36)
    assert "rows.jsonl:3: the prompt has" in caplog.text
    assert inspect.main([str(tmp_path / "x")]) == 0
    assert "but at most 1 that were cut" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "x.json").read_text())
    del manifest["conversations"]["num_cut"]
    (tmp_path / "x.json").write_text(json.dumps(manifest))
    assert inspect.main([str(tmp_path / "x")]) == 1, "a document without EOS that was not cut is a fault"


BAD = {
    "no_reply": {"messages": [{"role": "user", "content": "a"}]},
    "roles": {"messages": [{"role": "assistant", "content": "a"}]},
    "empty": {"prompt": "a", "response": " "},
    "format": {"text": "a"},
    "mask": {"input_ids": [20, 14], "prompt_lengths": 1},
    "several_replies": {"input_ids": [20, 21, 22, 23], "loss_mask": [0, 1, 0, 1]},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_stops_with_its_line(run, caplog, reason):
    run([ROWS[0], BAD[reason], ROWS[0]], status=1)
    assert re.search(r"rows\.jsonl:2: .*--on-error skip leaves such input out", caplog.text)


def test_bad_rows_are_skipped_and_counted(run, tmp_path, caplog):
    caplog.set_level("INFO")
    dataset = run([ROWS[0], *BAD.values(), "{", PAIRS[0], ROWS[0]], "--on-error", "skip")
    assert dataset.num_documents == 2
    counts = json.loads((tmp_path / "x.json").read_text())["conversations"]
    found = {name.removeprefix("num_bad_"): number for name, number in counts.items() if name.startswith("num_bad_")}
    assert found == {**dict.fromkeys(BAD, 1), "format": 2}
    assert "left out 8 files or lines that are not conversations" in caplog.text
    assert caplog.text.count("left out: ") == 8
    assert "left out rows that are bad (roles): 1" in caplog.text


def test_a_template_of_a_model(run, tokenizer, tmp_path):
    (tmp_path / "model").mkdir()
    config = {"chat_template": CHATML, "eos_token": END}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    dataset = run(ROWS[:1], "--template", str(tmp_path / "model"))
    assert texts(dataset, tokenizer) == [(f"{START}user\nsort 3 1 2{END}\n{START}assistant\n", f"1 2 3{END}<eos>")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ eos_token }}{{ messages[0].content }}", "writes eos_token, which is <|end|>, and the tokenizer has no special token of this"),
        ("{% if %}", "is no chat template"),
        ("{{ messages[-1].content }}", "rows.jsonl:1: the tokens that the model sees before its reply are not those of the conversation"),
    ],
)
def test_templates_that_do_not_fit(run, tmp_path, caplog, template, message):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (tmp_path / "a.jinja").write_text(template)
    run(ROWS[:1], "--template", str(tmp_path / "a.jinja"), status=1)
    assert message in caplog.text


def test_a_template_of_another_tokenizer_is_warned_of(run, tmp_path, caplog):
    (tmp_path / "a.jinja").write_text(CHATML.replace(START, "<|im_start|>"))
    run(ROWS[:1], "--template", str(tmp_path / "a.jinja"))
    assert "writes <|im_start|>, which is no special token of the tokenizer" in caplog.text


def test_outputs_are_not_replaced(run, tmp_path, caplog):
    run(ROWS)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("x.*")}
    arguments = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer", "nonesuch", "--output", str(tmp_path / "x")]
    assert conversations.main(arguments) == 1
    assert "exist already" in caplog.text
    assert {path.name: path.read_bytes() for path in tmp_path.glob("x.*")} == before
    run(ROWS, "--overwrite")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("x.*")} == before, "equal input gives equal files"


def test_what_is_no_json_is_refused(tokenizer_file, tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer_file), "--output", str(tmp_path / "x")]
    assert conversations.main(arguments) == 1
    assert "a.txt is no JSON by its name" in caplog.text


def test_of_pairs_the_last_reply_is_compared(run, caplog):
    run(PAIRS, "--replies", "split", status=1)
    assert "--replies split is for conversations" in caplog.text


def test_all_rows_left_out(run, caplog):
    run(ROWS[:1], "--max-length", "5", status=1)
    assert "the corpus is empty: no conversations in 1 files" in caplog.text
    run([ROWS[0]], "--validation-output", "y", "--validation-fraction", "0.0001", status=1)
    assert "no row is left for the validation dataset" in caplog.text


@pytest.mark.parametrize(
    "options",
    [["--max-length", "1"], ["--max-length", "x"], ["--validation-fraction", "0.1"], ["--date", "today"], ["--replies", "first"]],
)
def test_wrong_options(run, options, capsys):
    with pytest.raises(SystemExit) as ended:
        run(ROWS, *options)
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "talks"}, "conversations.kind is 'talks', not conversations or preferences"),
        ({"replies": "first"}, "conversations.replies is 'first'"),
        ({"num_cut": "many"}, "conversations.num_cut is 'many'"),
        ({"kind": "preferences"}, "3 documents are not pairs"),
    ],
)
def test_damaged_manifests(run, tmp_path, change, message):
    run(ROWS[:3])
    manifest = json.loads((tmp_path / "x.json").read_text())
    manifest["conversations"] |= change
    (tmp_path / "x.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=message):
        TokenDataset.open(tmp_path / "x")


def test_a_manifest_of_other_texts_has_no_key(make_dataset, tmp_path):
    make_dataset(tmp_path / "y", [[20, 21]])
    assert "conversations" not in json.loads((tmp_path / "y.json").read_text())
    assert DatasetManifest.read(tmp_path / "y.json").conversations == {}


def test_inspect_shows_what_may_be_noised(run, tokenizer_file, tmp_path, capsys):
    run(PAIRS[:2])
    page = tmp_path / "page.html"
    assert inspect.main([str(tmp_path / "x"), "--tokenizer", str(tokenizer_file), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "--- pair 1, rejected (document 3)\nuser:\nnumber 1<eos>assistant:\n[[bad<eos>]]" in out
    assert "stays clean, [[may be noised]]" in out
    assert "conversations" in out
    assert "preferences, replies: last, template: 'the built-in template'" in out
    assert '<span class="clean">user:\nnumber 1&lt;eos&gt;assistant:\n</span><span class="noised">bad&lt;eos&gt;</span>' in page.read_text()


def test_inspect_tells_fill_from_the_end(make_flagged, tokenizer_file, capsys, monkeypatch):
    prefix = make_flagged([20, 21, 1, 1, 0], [False, True, True, True, True])
    assert inspect.main([prefix, "--tokenizer", str(tokenizer_file), "--no-scan"]) == 0
    assert "%[[&<eos>]]((<eos><pad><eos>))" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert inspect.main([prefix, "--tokenizer", str(tokenizer_file), "--no-scan"]) == 0
    assert "\x1b[1;32m&<eos>\x1b[0m\x1b[2m<eos><pad><eos>\x1b[0m" in capsys.readouterr().out


@pytest.fixture
def make_flagged(tokenizer, tmp_path):
    from w1train.data.writer import DatasetWriter

    def make(ids, flags) -> str:
        with DatasetWriter(tmp_path / "z", tokenizer, limits_noise=True) as writer:
            writer.add_document(ids, 5, [*flags, True])
            writer.finalize()
        return str(tmp_path / "z")

    return make


def test_two_processes_do_not_write_one_dataset(run, tmp_path):
    """A killed process leaves partial files, which the next one replaces."""
    for name in ("x.bin.partial", "x.idx.partial", "x.may_be_noised.partial"):
        (tmp_path / name).write_bytes(os.urandom(9))
    assert run(ROWS).num_documents == 4
    assert not list(Path(tmp_path).glob("x.*partial"))
