"""The comparison of noise processes: its vocabulary and corpora, what it counts, which claims hold, and tiny trainings from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import w1train
from benchmarks.processes import correct, page, train
from benchmarks.processes.characters import CHARACTERS, NUM_TEXT_IDS, character_tokenizer
from benchmarks.processes.results import Results, read_results
from benchmarks.processes.trainings import (
    CORRECTION,
    CORRECTIONS,
    FAMILIES,
    JUDGE,
    NUM_EPOCHS,
    PROCESSES,
    num_tokens,
    repeated,
    repeated_name,
)
from tests.reports.fake_run import write_fake_run
from w1train.config.compose import load_config
from w1train.config.errors import UserError
from w1train.data.sharded_dataset import open_dataset
from w1train.data.writer import DatasetWriter

TINY = ["model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=48", "validation.num_samples=8", "validation.timesteps=[0.5]"]
TINY += ["schedule.stages.stable.tokens=4096", "schedule.stages.stable.rewarm_tokens=0", "~schedule.stages.decay"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of characters, and small datasets for training and validation."""
    directory = tmp_path_factory.mktemp("processes-data")
    tokenizer = character_tokenizer()
    tokenizer.save(directory / "tokenizer.json")
    for name, num_documents in (("train", 12), ("validation", 3)):
        with DatasetWriter(directory / name, tokenizer) as writer:
            for number in range(num_documents):
                text = "".join(f"x{number} = {i} * {i % 7}\n" for i in range(60))
                writer.add_document(tokenizer.encode(text), num_text_bytes=len(text))
            writer.finalize()
    return directory


# The vocabulary and the corpora


def test_the_tokenizer_has_one_id_for_each_character():
    tokenizer = character_tokenizer()
    ids = tokenizer.encode(CHARACTERS)
    assert ids == list(range(1, NUM_TEXT_IDS))
    assert tokenizer.decode(ids) == CHARACTERS
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id) == (0, NUM_TEXT_IDS, NUM_TEXT_IDS + 1)
    assert tokenizer.num_bytes_by_token().tolist() == [0, *[1] * len(CHARACTERS), 0, 0]


def test_the_recipe_has_the_ids_of_the_tokenizer():
    config, tokenizer = load_config(["recipe=processes"]), character_tokenizer()
    assert config.model.vocab_size == config.diffusion.num_noise_ids == tokenizer.vocab_size
    assert config.diffusion.mask_token_id == tokenizer.mask_token_id


def test_the_small_corpus_has_parts_of_the_whole_text(data):
    train.write_small_corpus(data, 3000)
    small, whole = open_dataset(data / "small"), open_dataset(data / "train")
    pieces = [small.document_tokens(document).tolist()[:-1] for document in range(small.num_documents)]
    texts = [whole.document_tokens(document).tolist() for document in range(whole.num_documents)]
    assert sum(map(len, pieces)) == 3000
    assert len(pieces) > 1
    assert all(any(text[: len(piece)] == piece for text in texts) for piece in pieces)


def test_trainings_on_the_small_corpus_read_it_once_and_often():
    by_name = {training.name: training for training in repeated(Path("data"), ["schedule.stages.stable.tokens=300000"])}
    assert len(by_name) == 4
    once = by_name[repeated_name(JUDGE, 1)].overrides
    assert "data.train=data/small" in once
    assert "schedule.stages.stable.tokens=10000" in once
    often = by_name[repeated_name(JUDGE, NUM_EPOCHS)].overrides
    assert not any(override.startswith("schedule") for override in often)
    assert num_tokens([*once[2:]]) == num_tokens(["schedule.stages.stable.tokens=300000"]) // NUM_EPOCHS


def test_a_training_that_fails_is_named(tmp_path, monkeypatch, capsys):
    def run(words, stdout, stderr):
        name = words[5].removeprefix("name=")
        stdout.write(f"out of {name}\n")
        return SimpleNamespace(returncode=3 if name == "mdlm" else 0)

    monkeypatch.setattr(train.subprocess, "run", run)
    assert train.run_side_by_side(tmp_path, tmp_path, PROCESSES[:4], ["training.seed=7"], at_once=2) == ["mdlm"]
    assert "out of mdlm" in capsys.readouterr().out
    assert sorted(path.stem for path in tmp_path.glob("*.log")) == sorted(training.name for training in PROCESSES[:4])


def test_an_unknown_training_is_an_error(data, capsys):
    assert train.main([str(data), "--data", str(data), "--only", "mdml"]) == 2
    assert "there is no training mdml" in capsys.readouterr().err


# What self-correction is measured by


def test_a_tenth_of_the_characters_is_replaced_by_other_characters():
    original = torch.randint(0, NUM_TEXT_IDS, (50, 120), generator=torch.Generator().manual_seed(1))
    texts = correct.corrupted(original)
    assert texts.is_wrong.sum(dim=1).tolist() == [12] * 50
    assert texts.tokens.min() >= 0
    assert texts.tokens.max() < NUM_TEXT_IDS
    others = (texts.tokens - original)[texts.is_wrong] % NUM_TEXT_IDS
    assert len(others.unique()) == NUM_TEXT_IDS - 1  # 600 draws leave no id out
    assert not torch.equal(correct.corrupted(original, seed=1).tokens, texts.tokens)


def test_repairs_and_damages_are_counted_apart():
    original = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    texts = correct.Corrupted(original, torch.tensor([[9, 9, 3, 4, 5, 6, 7, 8]]))
    revised = torch.tensor([[1, 9, 3, 4, 5, 6, 9, 9]])
    found = correct.repair(texts, revised)
    assert {name: found[name] for name in ("repaired", "damaged", "wrong", "fewer")} == pytest.approx(
        {"repaired": 1 / 2, "damaged": 2 / 6, "wrong": 3 / 8, "fewer": -1}
    )


def test_the_standard_error_is_that_of_the_mean_over_texts():
    original = torch.zeros(4, 6, dtype=torch.int64)
    wrong, revised = original.clone(), original.clone()
    wrong[:, :3] = 1
    for row, num_wrong in enumerate((0, 1, 1, 4)):
        revised[row, :num_wrong] = 1
    found = correct.repair(correct.Corrupted(original, wrong), revised)
    assert found["fewer"] == pytest.approx(1.5)
    assert found["fewer_error"] == pytest.approx(3**0.5 / 2)


def test_the_area_under_the_curve():
    labels = torch.tensor([[False, True], [False, True]])
    assert correct.area_under_curve(torch.tensor([[1.0, 3.0], [2.0, 4.0]]), labels) == 1
    assert correct.area_under_curve(torch.tensor([[1.0, 3.0], [4.0, 2.0]]), labels) == 0.5
    assert correct.area_under_curve(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), labels) == 0


def test_entropy_of_characters():
    assert correct.unigram_entropy(torch.arange(8).reshape(2, 4)) == pytest.approx(3)
    assert correct.unigram_entropy(torch.full((2, 4), 5)) == 0


# Claims


def run_with(bits: list[float], directory: Path, name: str):
    """A finished run with these validations, in bits per character, after its first step."""
    write_fake_run(directory / name, num_steps=40)
    lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    validations = [record for record in lines if record["kind"] == "validation"]
    kept = [record | {"elbo_bits_per_byte": value} for record, value in zip(validations, [9.0, *bits], strict=False)]
    kept += [record for record in lines if record["kind"] == "train"]
    (directory / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))


ENDS = {"autoregression": 2.0, "genmd4": 2.4, "mdlm": 2.5, "sedd": 2.6, "d3pm": 2.7, "gidd_0.1": 2.8, "gidd_0.2": 2.9, "udlm": 3.0}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, end in ENDS.items():
        run_with([end + 1, end + 0.5, end], tmp_path, name)
    run_with([2.5, 2.3, 2.9], tmp_path, repeated_name(JUDGE, NUM_EPOCHS))
    run_with([3.0, 2.8, 2.7], tmp_path, repeated_name("mdlm", NUM_EPOCHS))
    run_with([3.5], tmp_path, repeated_name("mdlm", 1))
    return tmp_path


def test_the_published_order_holds_or_not(runs):
    results = read_results(runs)
    assert [verdict.holds for verdict in results.order()] == [True] * (len(FAMILIES) - 1)
    assert "masked noise, 2.400 to 2.700, is better than hybrid noise, 2.800 to 2.900" in results.order()[1].claim
    run_with([2.95, 2.85], runs, "d3pm")
    assert [verdict.holds for verdict in read_results(runs).order()] == [True, False, True]


def test_the_table_says_how_much_each_run_was_still_falling(runs):
    run_with([2.9, 2.6, 2.75], runs, "d3pm")
    table = read_results(runs).process_table()
    column = table.columns.index("fall since the validation before")
    falls = {row[0]: row[column] for row in table.rows}
    assert falls["MD4 and MDLM"] == "0.500"
    assert falls["D3PM, absorbing"] == "-0.150"


def test_repeated_data(runs):
    autoregression, masked = read_results(runs).repeated_verdicts()
    assert (autoregression.holds, masked.holds) == (False, True)
    assert "it is 0.600 above it" in autoregression.claim


def correction(after: float, before: float = 0.1) -> dict:
    shared = {"repaired": 0.5, "damaged": 0.01, "entropy": 4.5, "fewer": 2.5, "fewer_error": 0.25}
    numbers = {share: shared | {"wrong": share, "bits_per_character": 3 + 10 * share} for share in (0.0, before, after)}
    texts = {"the text": numbers[0.0], "with wrong characters": numbers[before]}
    texts |= {f"corrected: {each.title}": numbers[after if each.improves else before] for each in CORRECTIONS}
    areas = {each.run: {"present": 0.97, "new": 0.825} for each in CORRECTIONS}
    shown = {"detection": areas, "texts": texts, "examples": [dict.fromkeys(texts, "if <a> & b:\n")]}
    return {"num_texts": 4, "length": 128, "share": 0.1, **shown}


def test_self_correction_is_an_improvement_or_not(runs):
    found = [[verdict.holds for verdict in Results({}, correction(after)).correction_verdicts()] for after in (0.04, 0.1)]
    assert found == [[True, True, True] * 2, [False, False, True] * 2]


def test_the_page_and_the_report_have_everything(runs, tmp_path, monkeypatch, capsys):
    (runs / CORRECTION).write_text(json.dumps(correction(0.04)))
    monkeypatch.setattr(page, "write_report", lambda name, title, tables, notes: "\n".join([notes, *(t.markdown() for t in tables)]))
    assert page.main([str(runs), "--report"]) == 0
    html, printed = (runs / "report.html").read_text(), capsys.readouterr().out
    assert html.count('data-chart="') == 2
    assert "if &lt;a&gt; &amp; b:" in html
    for text in (
        "GIDD, p_u = 0.2",
        "masked noise, 30 epochs",
        "corrected: p_u = 0.2, conditional modes",
        "+2.50 +- 0.25",
        "0.825",
        "2.900",
    ):
        assert text in html
        assert text in printed
    assert "- yes: gidd_0.2 (p_u = 0.2, conditional modes) improves the texts" in printed
    assert "- **no**: autoregression ends 30 epochs" in printed


def test_a_directory_without_finished_trainings(tmp_path):
    with pytest.raises(UserError, match="has no finished training: `make processes` trains autoregression, genmd4"):
        read_results(tmp_path)
    assert page.main([str(tmp_path)]) == 2


# From end to end


@pytest.mark.slow
def test_tiny_trainings_make_a_page(data, tmp_path):
    """The commands of four trainings of two steps, in this process; then self-correction and the report."""
    chosen = [training for training in PROCESSES if training.name in (JUDGE, *{each.run for each in CORRECTIONS})]
    for training in chosen:
        recipe, *overrides = (text.partition("=") for text in train.settings(tmp_path, data, TINY, training))
        w1train.train(recipe[2], {key: yaml.safe_load(value) if value else None for key, _, value in overrides})
    result = correct.compare(tmp_path, num_texts=4)
    (tmp_path / CORRECTION).write_text(json.dumps(result))
    changed = result["texts"]["with wrong characters"]
    assert (changed["repaired"], changed["damaged"]) == (0, 0)
    assert changed["wrong"] == pytest.approx(13 / 128)
    assert changed["bits_per_character"] == pytest.approx(math.log2(NUM_TEXT_IDS), abs=2.5)
    assert result["texts"]["the text"]["wrong"] == 0
    assert page.main([str(tmp_path)]) == 0
    assert "UDLM" not in (tmp_path / "report.html").read_text()
    assert len(read_results(tmp_path).runs) == 4
