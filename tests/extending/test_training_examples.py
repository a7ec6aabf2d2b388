"""The examples of docs/extending.md that train, resume or convert a tiny model, each on forked ranks."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.distributed import run_distributed
from tests.extending.examples import examples
from tests.parallel.layouts import train_layout
from tests.test_registered_names import name_problems
from tests.tiny import packed_batch, tiny_config
from w1train.diffusion.corruption import corrupt, corrupt_at
from w1train.diffusion.processes import noise_process
from w1train.engine.building import TrainedModel, build_trained_model
from w1train.runtime.distributed import distributed
from w1train.training.forward import run_micro_batches

RATE = 1e-2


def update(model: TrainedModel) -> None:
    """Do the optimizer's part of a step."""
    for group in model.optimizer.param_groups:
        group["lr"] = RATE * group["lr_mult"]
    model.optimizer.step()


def step(config, model: TrainedModel, noisy) -> dict:
    """Train one step on one micro-batch, and return its metrics."""
    model.zero_gradients()
    metrics, _ = run_micro_batches(config, list(model.chunks), iter([noisy]), 1, training=True)
    update(model)
    return metrics


def test_the_process_trains(monkeypatch):
    """Where the head is zero, each token that can be predicted has the same probability, so the ELBO at each t is known. From there it
    falls."""
    examples()["A noise process"].register("PROCESSES", monkeypatch)
    config = tiny_config(
        diffusion={"objective": "quadratic", "random_length_probability": 0.0, "t_min": 0.1}, training={"micro_batch_size": 8}
    )
    assert name_problems(config) == []
    batch = packed_batch(range(8))

    def train(_rank, _size):
        with distributed(config.parallel):
            model = build_trained_model(config)
            with torch.no_grad():
                model.stages[0].output_layer.weight.zero_()
            model.optimizer.reload_model_params()
            elbos = {}
            for timestep in (0.2, 0.5, 0.9):
                noisy = corrupt_at(batch, config.diffusion, 0, timestep, draw=1)
                metrics, _ = run_micro_batches(config, list(model.chunks), iter([noisy]), 1, training=False)
                elbos[timestep] = (metrics["elbo"], int(noisy.loss_mask.sum()) / int(noisy.num_tokens))
            return elbos, [step(config, model, corrupt(batch, config.diffusion, 0))["elbo"] for _ in range(8)]

    ((elbos, trained),) = run_distributed(train, 1, process_group=False)
    nats = math.log(config.model.vocab_size - 1)
    for timestep, (elbo, share) in elbos.items():
        weight = 2 * (1 - timestep) / (timestep * (2 - timestep))
        assert elbo == pytest.approx(nats * weight * share, rel=1e-5)
        assert float(noise_process(config.diffusion).elbo_weight(torch.tensor(timestep).double())) == pytest.approx(weight)
    assert trained[-1] < 0.9 * trained[0]


def test_the_optimizer_steps(monkeypatch):
    """The first step against the formula; weight decay is decoupled, and vectors have none."""
    examples()["An optimizer"].register("OPTIMIZERS", monkeypatch)
    config = tiny_config(optimizer={"name": "adabelief", "clip_grad": 0.0}, parallel={"distributed_optimizer": False})
    assert name_problems(config) == []

    def train(_rank, _size):
        with distributed(config.parallel):
            model = build_trained_model(config)
            parameters = list(model.stages[0].parameters())
            before = [parameter.detach().clone() for parameter in parameters]
            model.zero_gradients()
            noisy = corrupt(packed_batch(range(2)), config.diffusion, 0)
            run_micro_batches(config, list(model.chunks), iter([noisy]), 1, training=True)
            gradients = [parameter.main_grad.clone() for parameter in parameters]
            update(model)
            return list(zip(before, gradients, [parameter.detach() for parameter in parameters], strict=True))

    (parameters,) = run_distributed(train, 1, process_group=False)
    settings = config.optimizer
    assert any((gradient != 0).any() for _, gradient, _ in parameters)
    for before, gradient, after in parameters:
        decay = settings.weight_decay if before.ndim > 1 else 0.0
        variance = (settings.beta1 * gradient) ** 2 + settings.epsilon / (1 - settings.beta2)
        expected = before * (1 - RATE * decay) - RATE * gradient / (variance.sqrt() + settings.epsilon)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)


def test_the_optimizer_resumes(monkeypatch, tmp_path):
    """From its own state bit for bit, and on one rank from the state that two ranks saved. A state that was lost would give other steps."""
    examples()["An optimizer"].register("OPTIMIZERS", monkeypatch)
    config = tiny_config(optimizer={"name": "adabelief"})
    whole = train_layout(config, num_steps=4)
    for num_ranks in (1, 2):
        train_layout(config, num_ranks, save=tmp_path / str(num_ranks), num_steps=2)
        (checkpoint,) = (tmp_path / str(num_ranks)).iterdir()
        rest = train_layout(config, load=checkpoint, num_steps=2)
        if num_ranks == 1:
            assert rest.losses == whole.losses[2:]
            assert all(torch.equal(value, whole.parameters[name]) for name, value in rest.parameters.items())
        else:
            for name, value in rest.parameters.items():
                torch.testing.assert_close(value, whole.parameters[name], rtol=1e-4, atol=1e-6)


def test_the_family_comes_in_and_goes_out(monkeypatch, tmp_path):
    """A tiny Qwen2 under Dream's model type: the same tensors in the model, and the same files in an export."""
    from tests.conversion import test_export, tiny_models

    examples()["A model family"].register("FAMILIES", monkeypatch)
    original, run, output = (tmp_path / name for name in ("original", "run", "output"))
    tiny_models.make("qwen2", original)
    config_file = original / "config.json"
    described = json.loads(config_file.read_text()) | {"model_type": "Dream", "architectures": ["DreamModel"]}
    config_file.write_text(json.dumps(described))
    config = tiny_models.config_for(original)
    assert config.model.qkv_bias
    tiny_models.on_ranks(tiny_models.import_and_save, config, run)
    test_export.export(run, output, "--format", "Dream")
    exported = json.loads((output / "config.json").read_text())
    assert (exported["model_type"], exported["architectures"]) == ("Dream", ["DreamModel"])
    test_export.assert_identical(test_export.read_all(output), test_export.read_all(original))
