"""The gradient itself, against plain autograd on the whole global batch. Layouts agreeing with one another cannot show a wrong
scale, and AdamW hides one; clipping and the logged norm do not."""

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import micro_batches, open_gates, whole_tensors
from tests.tiny import packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.model.initialization import global_named_parameters  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402


def expected_gradients(config, model):
    """d/dw of (sum of weight * cross-entropy) / count, one graph over all samples: nothing of the training path but the model."""
    stage = model.stages[0]
    batch = packed_batch(range(config.training.global_batch_size), config.data.sequence_length)
    noisy = corrupt(batch, config.diffusion, config.training.seed)
    logits = stage(rank_inputs(noisy, config).model)
    cross_entropy = torch.nn.functional.cross_entropy(logits, noisy.targets[noisy.loss_mask], reduction="none")
    timesteps = noisy.target_timesteps[noisy.loss_mask]
    weights = {"inverse_t": 1 / timesteps, "constant": torch.ones_like(timesteps)}[config.diffusion.weight]
    real = noisy.document_ids >= 0
    if config.diffusion.normalizer == "samples":
        weights = weights / real.sum(dim=1, keepdim=True).expand_as(real)[noisy.loss_mask]
    count = {"tokens": real.sum(), "masked_tokens": noisy.loss_mask.sum(), "samples": len(real)}[config.diffusion.normalizer]
    names, parameters = zip(*global_named_parameters(stage), strict=True)
    gradients = torch.autograd.grad((cross_entropy * weights).sum() / count, parameters)
    return dict(zip(names, gradients, strict=True))


def _measure(_rank, _size, config):
    with distributed(config.parallel) as ranks:
        model = build_trained_model(config)
        open_gates(model)
        expected = expected_gradients(config, model)
        batches = list(micro_batches(config, 0, ranks.data_parallel_rank, ranks.data_parallel_size))
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        model.optimizer.zero_grad()
        run_micro_batches(config, list(model.chunks), iter(batches), len(batches), training=True)
        gradients = whole_tensors(model, lambda parameter: parameter.main_grad)
        decay = {
            name: group["weight_decay"]
            for group in model.optimizer.param_groups
            for name, parameter in global_named_parameters(model.stages[0])
            if any(parameter is other for other in group["params"])
        }
        norm = float(model.optimizer.step()[1])
        return gradients, expected, norm, decay


@pytest.mark.parametrize("data_parallel", [1, 2])
@pytest.mark.parametrize(("weight", "normalizer"), [("inverse_t", "tokens"), ("constant", "masked_tokens"), ("inverse_t", "samples")])
def test_is_that_of_the_objective_over_the_global_batch(weight, normalizer, data_parallel):
    """With samples cut to random lengths, so that no two micro-batches count alike."""
    config = tiny_config(
        diffusion={"weight": weight, "normalizer": normalizer, "random_length_probability": 0.5, "timestep_per": "document"},
        parallel={"distributed_optimizer": False},
        optimizer={"clip_grad": 1e-3},
    )
    gradients, expected, norm, decay = run_distributed(_measure, data_parallel, config, process_group=False)[0]
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm == pytest.approx(float(total), rel=1e-5), "the norm that is logged is the one before clipping"
    matrices = {name for name, gradient in expected.items() if gradient.dim() > 1}
    assert {name for name, value in decay.items() if value > 0} == matrices, "vectors are not decayed"
    assert set(decay) == set(expected)
