"""The demonstration of post-training: its questions, what it counts as a right answer, which claims hold, and its page."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.post_training import accuracy, post_training_page, question_texts
from benchmarks.post_training.accuracy import Reply, measured, preferred_share, replies
from benchmarks.post_training.made_questions import (
    CANVAS,
    GREETINGS,
    TASKS,
    TITLES,
    Preference,
    Question,
    conversations,
    preferences,
    questions,
)
from benchmarks.post_training.post_training_results import CONFIDENT, LONGER, PREFERRING, PRETRAINED, TUNED, fastest, read_results
from benchmarks.processes.characters import character_tokenizer
from tests.reports.fake_run import write_fake_run
from w1train.config.compose import load_config
from w1train.config.errors import UserError


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("post-training-data")
    question_texts.write_corpus(directory, num_texts=60, num_conversations=600, num_preferences=200, seed=0)
    return directory


# Questions


def test_answers_are_right():
    """Each answer is computed in another way than the generator computes it."""
    for question in islice(questions(random.Random(0), False), 200):
        name, subject = question.prompt.split(": ")
        assert name == question.task
        if name == "add":
            first, second = subject.split("+")
            assert int(question.answer) - int(first) == int(second)
            assert all(int(a) + int(b) < 10 for a, b in zip(first[::-1], second[::-1], strict=False)), "a carry"
        elif name == "sort":
            assert sorted(subject) == sorted(question.answer)
            assert all(a <= b for a, b in zip(question.answer, question.answer[1:], strict=False))
        else:
            assert question.answer == ("".join(reversed(subject)) if name == "reverse" else subject)


def test_all_tasks_are_equally_frequent():
    drawn = [question.task for question in islice(questions(random.Random(1), False), 40)]
    assert {drawn.count(name) for name in TASKS} == {10}


def subjects_of(prompts: list[str]) -> set[str]:
    """Words and sums, and the names of greeted people without their titles."""
    return {prompt.split(": ")[1].split(" ")[-1] for prompt in prompts}


def test_no_text_for_training_has_what_is_held_out(data):
    held_out = subjects_of([question.prompt for question in question_texts.read_questions(data)])
    held_out |= subjects_of([record["prompt"] for record in lines(data / "preferences_validation.jsonl")])
    held_out |= subjects_of([record["messages"][0]["content"] for record in lines(data / "conversations_validation.jsonl")])
    known = subjects_of([record["messages"][0]["content"] for record in lines(data / "conversations.jsonl")])
    known |= subjects_of([record["prompt"] for record in lines(data / "preferences.jsonl")])
    texts = {word.strip(".") for record in lines(data / "text.jsonl") for word in record["text"].split(" ")}
    assert len(held_out) > 300
    assert len(known) > 300
    assert not held_out & known
    # The reverse of a word, its letters in order and a sum are answers: they may be the subject of another question by chance.
    subjects = {word for word in texts if "+" in word}
    assert subjects
    assert not held_out & subjects


def test_texts_ask_no_question_and_fit_into_a_sample(data):
    length = load_config(["recipe=demo_pretrain"]).data.sequence_length
    for record in lines(data / "text.jsonl"):
        assert ":" not in record["text"]
        assert 60 < len(record["text"]) < length


def test_the_files_are_a_function_of_the_seed(data, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        question_texts.write_corpus(tmp_path / name, num_texts=60, num_conversations=600, num_preferences=200, seed=seed)
    for path in data.iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
        if path.suffix in (".jsonl", ".json"):
            assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()


def test_held_out_questions_differ_from_each_other(data):
    found = question_texts.read_questions(data)
    assert len(set(found)) == len(found) == 400


def test_a_conversation_fits_on_the_canvas():
    """A longer conversation would be packed in two canvases, and answers of the sampler end at the first."""
    for held_out in (False, True):
        for prompt, reply in islice(conversations(random.Random(2), held_out), 3000):
            assert len(prompt) + len("\n") + len(reply) + 1 <= CANVAS


def test_the_preferred_style_follows_from_the_title_alone():
    for pair in islice(preferences(random.Random(3), False), 200):
        has_title = any(title in pair.prompt.split(" ") for title in TITLES)
        assert pair.chosen.startswith(GREETINGS[0] if has_title else GREETINGS[1])
        assert pair.rejected.startswith(GREETINGS[1] if has_title else GREETINGS[0])
        assert pair.chosen.split(" ")[1:] == pair.rejected.split(" ")[1:] == pair.prompt.split(" ")[1:]
        assert len(pair.chosen) == len(pair.rejected)


def test_conversations_do_not_decide_the_style():
    """Both styles are equally frequent, with a title and without: the limit is four standard errors of 500 greetings."""
    greeted = [each for each in islice(conversations(random.Random(4), False), 10_000) if each[0].startswith("greet")]
    assert 850 < len(greeted) < 1150
    for has_title in (False, True):
        of_kind = [reply for prompt, reply in greeted if (len(prompt.split(" ")) == 3) == has_title]
        assert abs(sum(reply.startswith(GREETINGS[0]) for reply in of_kind) / len(of_kind) - 0.5) < 0.09


def test_the_recipes_have_the_canvas_and_the_ids_of_the_tokenizer():
    tokenizer = character_tokenizer()
    for recipe in ("demo_pretrain", "demo_cap", "demo_dpo", "demo_sft"):
        config = load_config([f"recipe={recipe}"])
        assert config.model.vocab_size == tokenizer.vocab_size
        assert config.diffusion.mask_token_id == tokenizer.mask_token_id
    assert config.data.align == CANVAS


# Answers


def test_right_answers_and_passes_are_counted():
    asked = [Question("copy", "copy: ab", "ab"), Question("copy", "copy: cd", "cd"), Question("add", "add: 1+1", "2")]
    found = measured(asked, [Reply("ab", 3, 2), Reply("cdd", 4, 2), Reply("2", 2, 1)])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["by_task"] == {"copy": 0.5, "add": 1.0}
    assert found["tokens_per_pass"] == pytest.approx(9 / 5)


def test_greetings_of_both_styles_and_others_are_counted():
    pairs = [Preference("greet: bo", "hello bo", "howdy bo")] * 4
    found = preferred_share(pairs, [Reply(text, 9, 9) for text in ("hello bo", "hello bo", "howdy bo", "hello bb")])
    assert found == {"chosen": 0.5, "rejected": 0.25}


def test_replies_are_in_the_order_of_the_prompts_and_fill_the_canvas(monkeypatch):
    """A sampler that answers with the prompt's letters; the second batch has one prompt."""
    asked = []

    def sample_texts(_model, _tokenizer, texts, config, *, device):
        sampling = config.sampling
        asked.append((len(texts[0]) + sampling.num_tokens, sampling.threshold, sampling.temperature))
        return [SimpleNamespace(text=f"{text.strip()}\nmore", tokens=[1] * 5, num_forward_passes=len(text)) for text in texts]

    monkeypatch.setattr("w1train.sampling.text.sample_texts", sample_texts)
    config = load_config(["recipe=demo_sft"])
    model = SimpleNamespace(config=config, predict=None, tokenizer=None, device="cpu")
    found = replies(model, ["aa", "bbb", "cc"], 0.7)
    assert found == [Reply("aa", 6, 3), Reply("bbb", 6, 4), Reply("cc", 6, 3)]
    assert asked == [(CANVAS, 0.7, 0.0)] * 2


def test_the_fastest_threshold_keeps_the_accuracy():
    curve = [{"accuracy": a, "tokens_per_pass": s} for a, s in ((0.99, 1.0), (0.95, 2.0), (0.96, 1.5), (0.5, 4.0))]
    assert fastest(curve, 0.95)["tokens_per_pass"] == 2.0
    assert fastest(curve, 0.955)["tokens_per_pass"] == 1.5
    assert fastest(curve, 0.995) is None


# Claims and the page


def answers(right: float, curve: list[tuple[float, float, float]] = ()) -> dict:
    point = {"accuracy": right, "by_task": dict.fromkeys(TASKS, right), "num_tokens": 9, "num_passes": 9, "tokens_per_pass": 1.0}
    curve = [{**point, "threshold": t, "accuracy": a, "tokens_per_pass": s} for t, a, s in curve]
    example = {"task": "sort", "prompt": "sort: <ba", "answer": "<ab", "reply": "<ab" if right > 0.5 else "<ba"}
    greetings = {"chosen": 0.48, "rejected": 0.5}
    return {"step": 40, "num_questions": 4, "one_token_a_pass": point, "curve": curve, "greetings": greetings, "examples": [example]}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    found = {
        PRETRAINED: answers(0.02),
        TUNED: answers(0.95, [(0.5, 0.90, 4.0), (0.95, 0.94, 2.0)]),
        LONGER: answers(0.96, [(0.5, 0.94, 2.8), (0.95, 0.96, 2.2)]),
        CONFIDENT: answers(0.95, [(0.5, 0.935, 3.0), (0.95, 0.95, 2.7)]),
        PREFERRING: answers(0.95),
    }
    for name, content in found.items():
        write_fake_run(tmp_path / name, num_steps=40)
        (tmp_path / name / accuracy.ANSWERS).write_text(json.dumps(content))
    path = tmp_path / PREFERRING / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == "validation":
            record |= {"preference_accuracy": 0.5 + 0.01 * record["step"], "preference_margin": 0.1, "preference_loss": 0.69}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_claims_hold_or_not(runs):
    results = read_results(runs)
    assert [verdict.holds for verdict in results.tuning_verdicts()] == [True, True]
    speed = results.speed_verdicts()
    assert [verdict.holds for verdict in speed] == [True, True, False, False]
    assert "at threshold 0.95, CAP gives at least 1.3 times the tokens a pass of SFT, 1.35 times" in speed[0].claim
    assert "1.50 times: SFT 2.00 at threshold 0.95 with 94.0% right, CAP 3.00 at threshold 0.5 with 93.5% right" in speed[1].claim
    (preferred,) = results.preference_verdicts()
    assert preferred.holds
    assert "50.0% became 90.0%" in preferred.claim
    (runs / PRETRAINED / accuracy.ANSWERS).write_text(json.dumps(answers(0.11)))
    (runs / CONFIDENT / accuracy.ANSWERS).write_text(json.dumps(answers(0.95, [(0.5, 0.92, 9.0), (0.95, 0.91, 9.0)])))
    results = read_results(runs)
    assert [verdict.holds for verdict in results.verdicts()] == [False, True, *[False] * 4, True]
    assert "CAP loses too many answers at every threshold" in results.speed_verdicts()[1].claim


def test_the_page_and_the_report_have_everything(runs, monkeypatch, capsys):
    monkeypatch.setattr(
        post_training_page, "write_report", lambda name, title, tables, notes: "\n".join([notes, *(t.markdown() for t in tables)])
    )
    assert post_training_page.main([str(runs), "--report"]) == 0
    html, printed = (runs / "report.html").read_text(), capsys.readouterr().out
    assert html.count('data-chart="') == 2
    assert "sort: &lt;ba\n&lt;ab" in html
    assert "pretrained: wrong, right is &lt;ab" in html
    for text in ("SFT, as long as CAP", "48.0%", "2.80", "0.100"):
        assert text in html
        assert text in printed
    assert "- yes: at the best threshold of each, CAP gives at least 1.3 times the tokens a pass of SFT, 1.50 times" in printed
    assert "- **no**: at threshold 0.95, CAP gives" in printed


def test_a_directory_without_finished_trainings(tmp_path):
    with pytest.raises(UserError, match="has no finished training: `make post-training` trains demo_pretrain, demo_sft"):
        read_results(tmp_path)
    assert post_training_page.main([str(tmp_path)]) == 2


def test_a_run_that_is_not_there(data, tmp_path, capsys):
    assert accuracy.main([str(tmp_path / "none"), "--data", str(data)]) == 2
    assert "none" in capsys.readouterr().err
