"""The examples of docs/extending.md that need no training: each does what its section says."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests.attention.cases import inputs_of, long_pack
from tests.diffusion.test_process import IDS, MASK, NUM_IDS, TIMES
from tests.extending.examples import examples
from tests.objectives.losses import NUM_BINS, loss, metrics
from tests.records.recorded_run import recorded_run
from tests.sampling.test_denoise import run as generate
from tests.test_registered_names import name_problems
from tests.tiny import packed_batch, tiny_config
from w1train.attention.backends.choice import choose_backend
from w1train.attention.backends.reference import attend_reference
from w1train.config.errors import UserError
from w1train.config.rules.attention_limits import AttentionCase
from w1train.config.rules.validate import validate
from w1train.config.schema import DiffusionConfig, SamplingConfig
from w1train.conversion.output_meaning import meaning_of_outputs, require_timesteps_of_masks
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt, corrupt_at
from w1train.diffusion.processes import noise_process
from w1train.evaluation.questions import Question, answer_questions
from w1train.objectives.objective import objective_of
from w1train.planning.workload import workload_of
from w1train.runtime.megatron_on_cpu import import_megatron
from w1train.sampling.text import sample_texts

import_megatron()

from w1train.checkpoints.manifest import Progress  # noqa: E402
from w1train.records import watch as watch_module  # noqa: E402
from w1train.records.watch import Watch  # noqa: E402
from w1train.runtime.distributed import Ranks  # noqa: E402


class Letters:
    """A tokenizer of one letter."""

    vocab_size, eos_token_id = 16, 0

    def encode(self, text):
        return [1] * len(text)

    def decode(self, ids):
        return "".join(map(str, ids))


@pytest.fixture
def quadratic(monkeypatch):
    """Register the process, and return a configuration that asks for it."""
    examples()["A noise process"].register("PROCESSES", monkeypatch)
    return DiffusionConfig(objective="quadratic", mask_token_id=MASK, random_length_probability=0.0, num_strata=64)


def test_the_process_is_consistent(quadratic):
    """Its marginals are distributions, its rates are derivatives, and its reverse kernel is Bayes' rule."""
    process = noise_process(quadratic)
    torch.testing.assert_close(process.alpha(TIMES), (1 - TIMES) ** 2)
    torch.testing.assert_close(process.timestep_at(process.noising_probability(TIMES)), TIMES)
    times = TIMES.clone().requires_grad_()
    for value, rate in (
        (process.alpha(times), process.alpha_rate(TIMES)),
        (process.noise(times[:, None], IDS).sum(), process.noise_rate(TIMES[:, None], IDS).sum(dim=1)),
    ):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), times)[0], rate)
    now, before = (process.alpha(t) * torch.eye(NUM_IDS).double() + process.noise(t, IDS) for t in torch.tensor([0.8, 0.3]).double())
    times = torch.full((NUM_IDS,), 0.8).double(), torch.full((NUM_IDS,), 0.3).double()
    kernel = process.reverse_probabilities(IDS, torch.eye(NUM_IDS).double()[:1].expand(NUM_IDS, -1), *times)  # the clean token is 0
    torch.testing.assert_close(now[0] @ kernel, before[0])


@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
def test_the_elbo_of_a_context_free_model_is_its_likelihood(quadratic, timestep_per):
    """The ELBO of any masking schedule is exact for a model that ignores its input (MD4, arXiv 2406.04329), up to what t below t_min would
    add."""
    quadratic.timestep_per, quadratic.t_min = timestep_per, 1e-3
    documents = torch.zeros((8192, 64), dtype=torch.int32)
    documents[:, 24:] = 1
    tokens = torch.randint(16, 20, documents.shape, generator=torch.Generator().manual_seed(0))
    log_probability = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))[tokens - 16]
    noisy = corrupt(PackedBatch(tokens, documents, documents, torch.arange(len(documents))), quadratic, seed=11)
    _, sums = loss(-log_probability[noisy.loss_mask], noisy, quadratic)
    share = (1 - quadratic.t_min * (2 - quadratic.t_min)) / (1 - quadratic.t_min)
    assert metrics(sums, quadratic)["elbo"] == pytest.approx(-float(log_probability.double().mean()) * share, rel=0.012)
    assert float(noisy.loss_mask.double().mean()) == pytest.approx(2 / 3, abs=0.01)


def test_planner_sampler_and_likelihood_use_the_process(quadratic):
    """None of them takes t for the noising probability."""
    config = tiny_config(diffusion={"objective": "quadratic", "t_min": 0.0, "random_length_probability": 0.0})
    assert workload_of(config).num_logits == pytest.approx(config.data.sequence_length * 2 / 3, rel=2e-3)
    assert name_problems(config) == []
    shown = []

    def predict(tokens, timesteps):
        shown.append(float(timesteps[0]))
        return torch.zeros(*tokens.shape, 16)

    config.sampling = SamplingConfig(num_tokens=4, num_steps=4)
    sample_texts(predict, Letters(), ["ab"], config, device="cpu")
    assert shown == pytest.approx([1 - math.sqrt(1 - count / 6) for count in (4, 3, 2, 1)])
    model = SimpleNamespace(predict=predict, config=config, tokenizer=Letters(), device="cpu")
    shown.clear()
    answer_questions(model, [Question(1, "ab", ("c",), 0)], num_draws=1, batch_size=1)
    assert shown == pytest.approx([1 - math.sqrt(2 / 3)])


def test_an_export_does_not_take_the_share_of_masks_for_t(quadratic):
    config = tiny_config(diffusion={"objective": "quadratic"})
    with pytest.raises(UserError, match=r"diffusion.objective=quadratic.*--format w1"):
        require_timesteps_of_masks(config)
    config.model.conditioning = "none"
    require_timesteps_of_masks(config)
    for name in ("diffusion", "autoregressive", "edits"):
        require_timesteps_of_masks(tiny_config(diffusion={"objective": name}))


@pytest.mark.parametrize("fields", [{"objective": "uniform"}, {"objective": "hybrid"}, {"noise_schedule": "cosine"}], ids=str)
def test_an_export_says_what_the_outputs_of_other_processes_mean(fields):
    """No export takes the share of masks for t where noise also puts other tokens in the place of tokens."""
    config = tiny_config(diffusion={"num_noise_ids": 96, **fields})
    with pytest.raises(UserError, match=r"--format w1"):
        require_timesteps_of_masks(config)
    config.model.conditioning = "none"
    require_timesteps_of_masks(config)
    for prediction in ("leave_one_out", "full"):
        config.diffusion.prediction = prediction
        keys = meaning_of_outputs(config)
        assert keys["process"] == noise_process(config.diffusion).name
        assert keys["prediction"] == (prediction if noise_process(config.diffusion).predicts_every_token else "full")
    config.diffusion.block_size = 4
    require_timesteps_of_masks(config)
    config.diffusion.clean_attention = "token_causal"
    if noise_process(config.diffusion).predicts_every_token:
        with pytest.raises(UserError, match="without mask tokens"):
            require_timesteps_of_masks(config)
    else:
        require_timesteps_of_masks(config)


def test_the_rules_of_sampling_hold_for_the_process(quadratic):
    config = tiny_config(diffusion={"objective": "quadratic"}, sampling={"num_tokens": 8, "num_steps": 8, "block_size": 5})
    assert [problem.key for problem in name_problems(config)] == ["sampling.block_size"]
    config.sampling.block_size, config.sampling.threshold, config.sampling.remasking = 4, 0.5, "random"
    assert [problem.key for problem in name_problems(config)] == ["sampling.remasking"]


def test_the_gradients_of_the_objective_change_as_stated(monkeypatch):
    examples()["An objective"].register("LOSSES", monkeypatch)
    plain, general = (DiffusionConfig(loss=name, random_length_probability=0.0, num_strata=8) for name in ("cross_entropy", "generalized"))
    noisy = corrupt(packed_batch(range(6)), plain, seed=1)
    cross_entropy = torch.rand(int(noisy.loss_mask.sum()), dtype=torch.float64, requires_grad=True)
    weights = objective_of(plain, NUM_BINS).weights(noisy)[noisy.loss_mask]
    p = (-cross_entropy.detach()).exp()
    weighted, sums = loss(cross_entropy, noisy, general)
    # The derivative of (1 - e^(-q x)) / q.
    torch.testing.assert_close(torch.autograd.grad(weighted, cross_entropy)[0], weights * p**0.7)
    found, before = metrics(sums, general), metrics(loss(cross_entropy, noisy, plain)[1], plain)
    assert found["loss"] == pytest.approx(float((weights * (1 - p**0.7) / 0.7).sum()) / int(noisy.num_tokens))
    assert {**found, "loss": before["loss"]} == before, "the ELBO and all other metrics stay"


def test_the_rule_of_sampling_decides(monkeypatch):
    """Position 0 has the most probable token; at position 1 the second token is further behind."""
    examples()["A rule of sampling"].register("ORDERS", monkeypatch)
    probabilities = torch.full((1, 2, 16), 1e-3)
    probabilities[0, 0, [5, 6]] = torch.tensor([0.6, 0.4])
    probabilities[0, 1, [7, 8]] = torch.tensor([0.5, 0.1])
    probabilities[0, 1, 9:13] = 0.1
    first = {}
    for name in ("low_confidence", "margin"):
        config, states = SamplingConfig(num_tokens=2, num_steps=2, remasking=name), []
        generate([[]], config, lambda _tokens, _t: probabilities.log(), states.append)
        first[name] = states[0].is_open[0].tolist()
        assert states[1].tokens[0].tolist() == [5, 7]
    assert first == {"low_confidence": [False, True], "margin": [True, False]}
    config = tiny_config(sampling={"remasking": "margin", "num_tokens": 8, "num_steps": 8})
    assert name_problems(config) == validate(config) == []
    config.sampling.threshold = 0.5
    assert [problem.key for problem in name_problems(config)] == ["sampling.remasking"], "its scores are no probabilities"


def test_the_kernel_of_sampling_decides(monkeypatch):
    examples()["A kernel of sampling"].register("KERNELS", monkeypatch)
    shown = []

    def predict(tokens, timesteps):
        shown.append(float(timesteps[0]))
        return torch.zeros(*tokens.shape, 16)

    generate([[]], SamplingConfig(num_tokens=8, num_steps=3, kernel="ancestral_cosine"), predict)
    assert shown == pytest.approx([1, math.cos(math.pi / 6), 0.5])
    assert name_problems(tiny_config(sampling={"kernel": "ancestral_cosine"})) == []
    config = tiny_config(sampling={"kernel": "ancestral_cosine", "threshold": 0.5})
    assert [problem.key for problem in name_problems(config)] == ["sampling.threshold"], "a rule that it inherits"


@pytest.mark.parametrize("kind", ["documents", "blocks", "scattered"])
def test_the_backend_equals_the_reference(kind, monkeypatch):
    examples()["An attention backend"].register("BACKENDS", monkeypatch)
    case = AttentionCase(kind, "fp32", 4, 2, 8)
    backend = choose_backend("rows", case, torch.device("cpu"))
    visibility = long_pack(160, kind)
    inputs = inputs_of(visibility, case, torch.float64)
    outputs = backend.attend(*inputs, backend.prepare(visibility)), attend_reference(*inputs, visibility.dense())
    upstream = torch.randn_like(outputs[0])
    for found, expected in zip(*((output, *torch.autograd.grad(output, inputs, upstream)) for output in outputs), strict=True):
        torch.testing.assert_close(found, expected)
    assert name_problems(tiny_config(attention={"backend": "rows"})) == []
    assert choose_backend("auto", case, torch.device("cpu")).name != "rows"
    choose_backend.cache_clear()


def test_the_sink_receives_records(tmp_path, monkeypatch):
    examples()["A record sink"].register("SINKS", monkeypatch)
    assert [sink.__name__ for sink in watch_module.SINKS][:2] == ["JsonLinesSink", "BestLossSink"]
    monkeypatch.setattr(watch_module, "SINKS", watch_module.SINKS[:2])

    def train(progress, losses):
        run = recorded_run(tmp_path, step=progress.step, wandb="disabled")
        with Watch(run, Ranks(0, 1, 0, 1, torch.device("cpu")), progress) as watch:
            for value in losses:
                progress.step += 1
                watch.record("train", {"loss": value})
            watch.record("validation", {"elbo": 0.0})
        return json.loads((tmp_path / "best_loss.json").read_text())

    assert train(Progress(), [3.0, 1.0, 2.0]) == {"step": 2, "loss": 1.0}
    assert train(Progress(step=3), [1.5]) == {"step": 2, "loss": 1.0}
    assert train(Progress(step=1), [2.5]) == {"step": 2, "loss": 2.5}, "the step is done again"


def test_at_one_t_the_process_noises_the_share_of_its_schedule(quadratic):
    noisy = corrupt_at(packed_batch(range(1024)), quadratic, seed=0, timestep=0.5, draw=1)
    share = (noisy.input_ids != noisy.tokens)[noisy.document_ids >= 0].double().mean()
    assert float(share) == pytest.approx(0.75, abs=0.01)
