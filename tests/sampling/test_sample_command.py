"""``w1train sample`` over a fake model whose tokens are bytes."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.data.chat_templates import CHATML, END, START
from w1train.config.errors import UserError
from w1train.config.schema import Config, DataConfig, DiffusionConfig, ModelConfig, SamplingConfig, ScheduleConfig, TrainingConfig
from w1train.data.tokenizer import train_tokenizer
from w1train.sample import main
from w1train.sampling.canvas import DenoisingStep
from w1train.sampling.display import DenoisingView, print_samples
from w1train.sampling.text import TextSample, sample_texts

MASK, EOS, VOCAB_SIZE = 256, 257, 260
ALPHABET = b"abcdefghijklmnopqrstuvwxyz"


class ByteTokenizer:
    vocab_size = 258
    eos_token_id = EOS

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        assert all(token < MASK for token in ids)
        return bytes(ids).decode(errors="replace")


def alphabet_logits(tokens: Tensor, _t: Tensor) -> Tensor:
    """Position i is letter i of the alphabet, surer to the left; the id beyond the tokenizer is surest of all."""
    letters = torch.tensor([ALPHABET[i % 26] for i in range(tokens.shape[1])])
    logits = torch.zeros(*tokens.shape, VOCAB_SIZE)
    logits[:, torch.arange(tokens.shape[1]), letters] = torch.linspace(9, 5, tokens.shape[1])
    logits[:, :, VOCAB_SIZE - 1] = 100
    return logits


class AlphabetBlocks:
    """``alphabet_logits`` by blocks of three."""

    block_size = 3

    def start(self, length: int, block_size: int) -> None:
        self.num_finished = 0

    def append(self, tokens: Tensor) -> None:
        self.num_finished += tokens.shape[1]

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        whole = torch.nn.functional.pad(tokens, (self.num_finished, 0))
        return alphabet_logits(whole, timesteps)[:, self.num_finished :]

    def select_rows(self, rows: Tensor) -> None:
        pass


def with_eos_at(place: int):
    def predict(tokens: Tensor, t: Tensor) -> Tensor:
        logits = alphabet_logits(tokens, t)
        logits[:, place, EOS] = 50
        return logits

    return predict


def run_config() -> Config:
    return Config(
        name="fake",
        model=ModelConfig(
            vocab_size=VOCAB_SIZE, num_layers=1, hidden_size=8, num_attention_heads=1, ffn_hidden_size=8, max_sequence_length=32
        ),
        data=DataConfig(train="", tokenizer="", sequence_length=32),
        diffusion=DiffusionConfig(mask_token_id=MASK),
        schedule=ScheduleConfig(stages={}),
        training=TrainingConfig(global_batch_size=1, micro_batch_size=1),
        sampling=SamplingConfig(prompts=["abc"], num_tokens=8, num_steps=4),
    )


@dataclass
class FakeModel:
    predict: object = alphabet_logits
    blocks: object = None
    config: Config = field(default_factory=run_config)
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    step: int = 90


@pytest.fixture
def run_dir(tmp_path) -> Path:
    (tmp_path / "config.yaml").touch()
    return tmp_path


@pytest.fixture
def sample(run_dir, capsys, monkeypatch):
    """Run the command; gives (exit status, stdout, stderr)."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # would make rich take the captured output for a terminal
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, model: FakeModel | None = None) -> tuple[int, str, str]:
        status = main([str(run_dir), *arguments], load=lambda _run, _step: model or FakeModel())
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_defaults_come_from_the_run(sample):
    status, out, err = sample()
    assert (status, out) == (0, "abcdefghijk\n")
    assert re.fullmatch(r"8 tokens in \d+\.\d\d s: \d+\.\d tokens/s, 2\.00 tokens per forward pass\n", err)


def test_a_text_is_shown_as_it_was_generated(sample):
    """Masks of passwords would alter it, and end inside an escape of the JSON."""
    prompt = '"s3://h/?key=a"\n'
    status, out, err = sample("--prompt", prompt, "--num-tokens", "2")
    assert (status, out.startswith(prompt)) == (0, True), err
    (shown,) = json.loads(sample("--json", "--prompt", prompt, "--num-tokens", "2")[1])["samples"]
    assert shown["prompt"] == prompt


def test_block_diffusion_is_sampled_by_cached_blocks(sample):
    """Three tokens of the prompt are a block to encode; then three blocks of 3, 3 and 2 tokens, two of them encoded, in 4 steps + 1."""

    def refuse(_tokens, _t):
        raise AssertionError("the whole canvas was read")

    model = FakeModel(predict=refuse, blocks=AlphabetBlocks())
    status, out, err = sample(model=model)
    assert (status, out) == (0, "abcdefghijk\n")
    assert err.endswith("1.00 tokens per forward pass\n")
    assert [each["num_forward_passes"] for each in json.loads(sample("--json", model=model)[1])["samples"]] == [8]


def test_the_threshold_replaces_the_steps(sample):
    status, out, err = sample("--threshold", "0.99", "--steps", "3")
    assert (status, out) == (0, "abcdefghijk\n")
    assert err.startswith("--steps is not used: with a threshold")
    model = FakeModel()
    model.config.sampling.threshold = 0.5
    [heading, *_] = sample("--show-steps", model=model)[1].splitlines()
    assert heading == "step 1  t = 0.727"
    assert json.loads(sample("--json", "--threshold", "0", model=model)[1])["sampling"]["threshold"] is None


def test_speed_counts_the_tokens_of_the_texts(sample):
    speed = json.loads(sample("--json", model=FakeModel(predict=with_eos_at(6)))[1])["speed"]
    assert speed["num_tokens"] == 3
    assert speed["tokens_per_forward"] == 0.75
    assert speed["tokens_per_second"] == pytest.approx(3 / speed["seconds"])


def test_prompts_are_completed_plainly_one_after_the_other(sample):
    assert sample("--prompt", "ab", "--prompt", "", "--num-tokens", "4")[:2] == (0, "abcdef\n\nabcd\n")


def test_long_lines_tabs_and_markup_are_printed_as_they_are(sample):
    model = FakeModel()
    model.config.model.max_sequence_length = 400
    status, out, _ = sample("--prompt", "[red]\tx[/red]", "--num-tokens", "200", "--steps", "1", model=model)
    assert status == 0
    assert out.startswith("[red]\tx[/red]nopq")
    assert out.count("\n") == 1


def test_a_prompt_with_an_id_that_the_model_does_not_have(sample):
    model = FakeModel()
    model.config.model.vocab_size = ord("b")
    status, _, error = sample("--prompt", "ab", model=model)
    assert status != 0
    assert "prompt 0 has the token id 98, and model.vocab_size is 98" in error


def test_json_names_the_newest_checkpoint(sample):
    assert json.loads(sample("--json")[1])["checkpoint"] == 90


def test_json(sample, run_dir):
    status, out, _ = sample(
        "--json", "--seed", "5", "--temperature", "0", "--checkpoint", "70", "--block-size", "4", "--remasking", "random"
    )
    assert status == 0
    result = json.loads(out)
    del result["speed"]
    assert result == {
        "run": str(run_dir),
        "checkpoint": 70,
        "sampling": {
            "chat_template": None,
            "num_tokens": 8,
            "num_steps": 4,
            "threshold": None,
            "block_size": 4,
            "temperature": 0.0,
            "remasking": "random",
            "seed": 5,
            "kernel": "unmask",
            "gidd_epsilon": 1e-4,
            "gidd_min_p": 0.0,
            "posterior_temperature": 1.0,
            "reviser": None,
            "correction_steps": 128,
            "correction_tokens": 1,
            "correction_temperature": 0.1,
            "correction_timestep": 0.01,
            "correction_patience": 32,
        },
        "samples": [{"prompt": "abc", "text": "defghijk", "tokens": list(b"defghijk"), "num_forward_passes": 4, "suffix": ""}],
    }


def test_the_text_ends_at_eos(sample):
    status, out, _ = sample("--json", model=FakeModel(predict=with_eos_at(6)))
    assert status == 0
    expected = {"prompt": "abc", "text": "def", "tokens": list(b"def"), "num_forward_passes": 4, "suffix": ""}
    assert json.loads(out)["samples"] == [expected]


@pytest.fixture(scope="module")
def chat_model():
    """A model of a tokenizer with bytes, which writes letters, then the token that ends a turn, then letters."""
    tokenizer = train_tokenizer(["abcdefghijklmnopqrstuvwxyz"], vocab_size=272)
    letters, end = tokenizer.encode(ALPHABET.decode()), tokenizer.ids_by_token()[END]

    def predict(tokens: Tensor, _t: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, tokenizer.vocab_size)
        for place in range(tokens.shape[1]):
            logits[:, place, end if place % 5 == 4 else letters[place % 26]] = 9
        return logits

    class Blocks(AlphabetBlocks):
        num_passes = 0

        def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
            self.num_passes += 1
            return predict(torch.nn.functional.pad(tokens, (self.num_finished, 0)), timesteps)[:, self.num_finished :]

    def make(by_block: bool = False) -> FakeModel:
        model = FakeModel(predict=predict, tokenizer=tokenizer, blocks=Blocks() if by_block else None)
        model.config.model.vocab_size, model.config.model.max_sequence_length = tokenizer.vocab_size, 99
        model.config.diffusion.mask_token_id = tokenizer.mask_token_id
        model.config.data.tokenizer = "tokenizer.json"
        return model

    return make


@pytest.mark.parametrize("by_block", [False, True])
def test_a_prompt_is_a_message_and_the_reply_ends_with_the_turn(sample, chat_model, tmp_path, by_block):
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    options = ("--json", "--prompt", "abc", "--chat-template", str(template), "--num-tokens", "12", "--threshold", "0.9")
    status, out, error = sample(*options, model=(model := chat_model(by_block)))
    assert status == 0, error
    (found,) = json.loads(out)["samples"]
    prompt = f"{START}user\nabc{END}\n{START}assistant\n"
    length = len(model.tokenizer.encode_with_special_tokens(prompt))
    expected = ALPHABET.decode()[length : length + (4 - length) % 5]
    assert (found["prompt"], found["text"]) == (prompt, expected)
    assert len(expected) == 2
    if by_block:
        assert model.blocks.num_passes == 2, "no block follows the block in which the reply ends"
    model.config.sampling.chat_template = str(template)
    assert json.loads(sample(*options[:3], "--chat-template", "", model=model)[1])["samples"][0]["prompt"] == "abc"
    revised = json.loads(sample(*options[:3], "--revise", "de", model=model)[1])["samples"][0]
    assert (revised["prompt"], revised["text"]) == (prompt, "de")
    status, _, error = sample("--prompt", " ", "--chat-template", "built_in", model=chat_model())
    assert (status, error.splitlines()[-1][:25]) == (2, "error: prompt 0 is empty;")


def test_block_size_zero_undoes_the_runs_blocks(sample):
    model = FakeModel()
    model.config.sampling.block_size = 4
    status, out, _ = sample("--json", "--block-size", "0", model=model)
    assert status == 0
    assert json.loads(out)["sampling"]["block_size"] is None
    assert model.config.sampling.block_size == 4


def test_show_steps_off_a_terminal_prints_each_canvas(sample):
    status, out, _ = sample("--show-steps")
    assert status == 0
    assert out.splitlines() == [
        "step 1/4  t = 0.727",
        "abcde" + 6 * "\u2591",
        "step 2/4  t = 0.545",
        "abcdefg" + 4 * "\u2591",
        "step 3/4  t = 0.364",
        "abcdefghi" + 2 * "\u2591",
        "step 4/4  t = 0.182",
        "abcdefghijk",
        "abcdefghijk",
    ]


def test_on_a_terminal_the_canvas_is_drawn_in_place_and_styled():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=60, height=20, color_system="standard", legacy_windows=False)
    with DenoisingView(console, ByteTokenizer()) as view:
        is_open = torch.tensor([[False, False, True, False, True, True]])
        view(DenoisingStep(1, 2, [0], 0.5, torch.tensor([list(b"abxcyz")]), is_open, torch.zeros_like(is_open), 2, 6))
        with_suffix = torch.nn.functional.pad(is_open, (0, 2))
        is_revised = torch.arange(8)[None] == 3
        view(DenoisingStep(2, 2, [0], 0.5, torch.tensor([list(b"abxcyzef")]), with_suffix, is_revised, 2, 6))
    print_samples(console, [TextSample("ab", "cd", list(b"cd"), 2, "ef"), TextSample("ab", "cd", list(b"cd"), 2)])
    drawn = stream.getvalue()
    assert "\x1b[1;36mab\x1b[0m\x1b[2m\u2591\x1b[0mc\x1b[2m\u2591\u2591\x1b[0m" in drawn
    assert "\x1b[1;36mab\x1b[0m\x1b[2m\u2591\x1b[0m\x1b[1;33mc\x1b[0m\x1b[2m\u2591\u2591\x1b[0m\x1b[1;36mef\x1b[0m" in drawn
    assert "\x1b[?25h" in drawn  # the cursor is back
    assert drawn.endswith("\x1b[1;36mab\x1b[0mcd\x1b[1;36mef\x1b[0m\n\n\x1b[1;36mab\x1b[0mcd\n")


def test_control_bytes_of_the_model_do_not_reach_the_terminal():
    stream = io.StringIO()
    print_samples(Console(file=stream, force_terminal=True, color_system=None), [TextSample("a\x1b[2J", "b\r\x07\nc", [], 1)])
    assert stream.getvalue() == "a\ufffd[2Jb\ufffd\ufffd\nc\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "3"], "sampling.block_size is 3; it must be a divisor of sampling.num_tokens (8): 1, 2, 4, 8"),
        (["--num-tokens", "30"], "prompt 0 has 3 tokens and sampling.num_tokens is 30"),
    ],
)
def test_bad_settings_are_one_line_on_stderr(sample, arguments, message):
    status, out, err = sample(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_errors_of_the_loader_are_reported(run_dir, capsys):
    def load(_run, step):
        raise UserError(f"no checkpoint of step {step}")

    assert main([str(run_dir), "--checkpoint", "7"], load=load) == 2
    assert capsys.readouterr().err == "error: no checkpoint of step 7\n"


def test_a_directory_that_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")], load=lambda _run, _step: FakeModel()) == 2
    assert "nowhere is not a run directory: it has no config.yaml" in capsys.readouterr().err


def test_skipped_steps_are_said(sample, caplog):
    status, *_ = sample("--num-tokens", "2")
    assert status == 0
    assert "2 of 4 denoising steps" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--remasking", "entropy"], "argument --remasking: found: 'entropy'; valid: low_confidence, random"),
        (["--threshold", "1.5"], "argument --threshold: found: 1.5; valid: a number >= 0 and <= 1"),
        (["--temperature", "-1"], "argument --temperature: found: -1; valid: a number >= 0"),
        (["--temperature", "nan"], "argument --temperature: found: nan; valid: a finite number >= 0"),
        (["--steps", "0"], "argument --steps: found: 0; valid: a number >= 1"),
        (["--num-tokens", "many"], "argument --num-tokens: found: 'many'; valid: a whole number >= 0"),
        (["--json", "--show-steps"], "not allowed with argument --json"),
    ],
)
def test_bad_arguments_are_refused_by_the_parser(run_dir, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([str(run_dir), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_sampling_does_not_import_megatron():
    code = "import sys, w1train.sampling.text, w1train.sampling.display; sys.exit('megatron' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_sample_texts_leaves_the_configuration_alone():
    model = FakeModel()
    before = run_config()
    [text] = sample_texts(model.predict, model.tokenizer, ["xyz"], model.config, device="cpu")
    assert text.text == "defghijk"
    assert model.config == before


def test_a_suffix_is_filled_in_before(sample):
    """Its five tokens are in the places after the generated ones, and none of them is generated again."""
    assert sample("--prompt", "abc", "--suffix", "ijklm", "--num-tokens", "5", "--steps", "5")[:2] == (0, "abcdefghijklm\n")
    shown = json.loads(sample("--json", "--prompt", "a", "--prompt", "ab", "--suffix", "xyz", "--num-tokens", "2")[1])["samples"]
    assert [(each["prompt"], each["text"], each["suffix"]) for each in shown] == [("a", "bc", "xyz"), ("ab", "cd", "xyz")]
    each_its_own = sample("--prompt", "a", "--suffix", "x", "--prompt", "ab", "--suffix", "yz", "--num-tokens", "2", "--steps", "1")
    assert each_its_own[:2] == (0, "abcx\n\nabcdyz\n")


def test_a_suffix_is_shown_at_each_step(sample):
    out = sample("--prompt", "ab", "--suffix", "xyz", "--num-tokens", "2", "--steps", "2", "--show-steps")[1]
    assert out.splitlines() == ["step 1/2  t = 0.286", "abc\u2591xyz", "step 2/2  t = 0.143", "abcdxyz", "abcdxyz"]


def test_nothing_is_filled_in_where_no_token_is_asked_for(sample):
    status, out, err = sample("--prompt", "ab", "--suffix", "xyz", "--num-tokens", "0")
    assert (status, out) == (0, "abxyz\n")
    assert "0 tokens in" in err
    assert sample("--suffix", "", "--num-tokens", "0", model=FakeModel(blocks=AlphabetBlocks()))[:2] == (0, "abc\n")
    assert sample("--num-tokens", "0")[0] == 2


def test_an_empty_suffix_is_no_suffix(sample):
    for arguments in (["--temperature", "1"], ["--num-tokens", "4", "--remasking", "random"]):
        assert sample(*arguments, "--suffix", "")[:2] == sample(*arguments)[:2]
    model = FakeModel(blocks=AlphabetBlocks())
    assert sample("--suffix", "", model=model)[:2] == (0, "abcdefghijk\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suffix", "x", "--suffix", "y", "--suffix", "z", "--prompt", "a", "--prompt", "b"], "3 texts with --suffix for 2 prompts"),
        (["--suffix", "x" * 22], "prompt 0 has 3 tokens, its suffix has 22 tokens and sampling.num_tokens is 8, which together"),
    ],
)
def test_bad_suffixes(sample, arguments, message):
    status, out, err = sample(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_blocks_do_not_see_a_suffix(sample):
    status, out, err = sample("--suffix", "x", model=FakeModel(blocks=AlphabetBlocks()))
    assert (status, out) == (2, "")
    assert "blocks of 3 tokens, and a block does not see the blocks after it" in err


def hybrid_model(**changes) -> FakeModel:
    """A model whose noise puts masks and other bytes, and which prefers its letters also when a text has others."""

    def predict(tokens: Tensor, t: Tensor) -> Tensor:
        return 4 * alphabet_logits(tokens, t)

    model = FakeModel(predict=predict)
    model.config.diffusion = DiffusionConfig(objective="hybrid", mask_token_id=MASK, num_noise_ids=VOCAB_SIZE, uniform_share=0.5)
    for name, value in changes.items():
        setattr(model.config.sampling, name, value)
    return model


def test_the_process_chooses_the_kernel(sample):
    """The ancestral kernel goes through the timesteps, and the mask and ids beyond the tokenizer come and go."""
    status, out, err = sample("--json", model=hybrid_model())
    assert (status, json.loads(out)["sampling"]["kernel"], json.loads(out)["samples"][0]["text"]) == (0, "ancestral", "defghijk"), err
    found = json.loads(sample("--json", "--kernel", "gidd_posterior", "--steps", "3", model=hybrid_model())[1])
    assert (found["sampling"]["kernel"], found["samples"][0]["num_forward_passes"]) == ("gidd_posterior", 3)
    status, out, err = sample("--kernel", "ancestral", "--threshold", "0.5")
    assert (status, out) == (2, "")
    assert "sampling.threshold is 0.5; it must be null, because this kernel decides by timesteps" in err


def test_a_given_text_is_revised_and_its_changes_are_marked(sample):
    status, out, _ = sample("--prompt", "xx", "--revise", "cdQfW", "--show-steps", model=hybrid_model())
    assert status == 0
    assert out.splitlines() == [
        "step 1  t = 0.010",
        "xxcd\u2039e\u203afW",
        "step 2  t = 0.010",
        "xxcdef\u2039g\u203a",
        "step 3  t = 0.010",
        "xxcdefg",
        "xxcdefg",
    ]
    assert sample("--revise", "abXd", "--revise", "Yb", model=hybrid_model())[:2] == (0, "abcd\n\nab\n")
    status, out, err = sample("--revise", "ab", "--prompt", "a", "--prompt", "b", model=hybrid_model())
    assert (status, out) == (2, "")
    assert "2 texts with --prompt for 1 texts with --revise" in err
    status, _, err = sample("--revise", "x" * 33, "--prompt", "a", model=hybrid_model())
    assert (status, "prompt 0 has 1 tokens and its text has 33 tokens, which together is more" in err) == (2, True)


def test_self_correction_follows_the_kernel(sample):
    """One pass more finds nothing to change."""
    shown = json.loads(sample("--json", "--self-correct", "--kernel", "unmask", model=hybrid_model())[1])
    assert (shown["sampling"]["reviser"], shown["samples"][0]["text"]) == ("self_correction", "defghijk")
    assert shown["samples"][0]["num_forward_passes"] == 4 + 1
