"""The plan's FLOPs per token, compared part by part with torch's FLOP counter on the real model."""

from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import run_distributed
from tests.tiny import VOCAB_SIZE, packed_batch, tiny_config
from w1train.planning.workload import flops_per_token, workload_of
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.data.batch import PackedBatch  # noqa: E402
from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import build_stage  # noqa: E402
from w1train.model.megatron_config import transformer_config  # noqa: E402
from w1train.model.row_terms import CrossEntropy  # noqa: E402
from w1train.objectives.description import num_streams  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import _loss, _work  # noqa: E402
from w1train.training.inputs import rank_inputs, sequence_visibility  # noqa: E402

LENGTH, NUM_SAMPLES = 64, 2
PARTS = {
    "attention_projections": ("linear_qkv", "linear_proj"),
    "attention_core": ("core_attention",),
    "mlp": ("linear_fc1", "linear_fc2"),
    "adaln": ("modulation.linear", "final_modulation.linear"),
    "timestep_mlp": ("linear_in", "linear_out"),
    "output_head": ("output_layer",),
}


def _batch(document_length):
    positions = torch.arange(LENGTH, dtype=torch.int32).expand(NUM_SAMPLES, -1)
    tokens = torch.arange(16, 16 + LENGTH).expand(NUM_SAMPLES, -1) % VOCAB_SIZE
    return PackedBatch(tokens, positions // document_length, positions % document_length, torch.arange(NUM_SAMPLES))


def _counted(_rank, _world_size, config, document_length):
    """Count the FLOPs of one micro-batch by part and in total."""
    with distributed(config.parallel):
        stage = build_stage(config, transformer_config(config.model, config.parallel, "fp32"))
        noisy = corrupt(_batch(document_length), config.diffusion, 0)
        assert bool(noisy.loss_mask.all())
        inputs = rank_inputs(noisy, config)
        # The backward pass of fused kernels computes the scores again. The counter counts this, the plan does not.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            values = stage(inputs.model, [CrossEntropy(inputs.targets)])
            _loss(config, inputs, _work(inputs), ["cross_entropy"], values)[0].backward()
        counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    parts = Counter()
    for part, names in PARTS.items():
        parts[part] = sum(flops for module, flops in counts.items() if module.endswith(tuple("." + name for name in names)))
    return dict(parts), counts["Global"]


PREDICTED = [
    {"noise_schedule": "cosine"},
    {"objective": "hybrid", "num_noise_ids": VOCAB_SIZE, "t_max": 0.9999},
    {"objective": "uniform", "num_noise_ids": VOCAB_SIZE, "t_max": 0.9999, "complementary": True},
    {"objective": "edits", "num_noise_ids": VOCAB_SIZE, "edited_share": 0.4, "t_max": 0.8},
]


@pytest.mark.parametrize("diffusion", PREDICTED, ids=str)
def test_the_planned_logits_are_those_of_the_noise(diffusion):
    config = tiny_config(diffusion={"random_length_probability": 0.0, "num_strata": 64, **diffusion})
    batch = packed_batch([index for index in range(768) if index % 3 != 2])  # these have no padding
    logits = corrupt(batch, config.diffusion, 0).loss_mask.sum(dim=1).double()
    work = workload_of(config)
    assert work.num_logits == pytest.approx(float(logits.mean()), rel=0.03)
    assert work.most_logits >= float(logits.max())


@pytest.mark.parametrize(
    ("model", "document_length", "diffusion"),
    [
        ({}, LENGTH, {"timestep_per": "sequence"}),
        ({}, 24, {"timestep_per": "document"}),
        ({"num_query_groups": 2, "qk_norm": True, "tie_embeddings": True}, 16, {"timestep_per": "document"}),
        ({"conditioning": "none"}, LENGTH, {}),
        ({}, 24, {"timestep_per": "block", "block_size": 16}),
        ({}, 24, {"timestep_per": "block", "block_size": 16, "block_index": "sample"}),
    ],
    ids=str,
)
def test_flops_per_token_part_by_part(model, document_length, diffusion):
    config = tiny_config(
        model=model,
        data={"sequence_length": LENGTH},
        # Every token is masked, so that the number of logits is known.
        diffusion={"random_length_probability": 0.0, "t_min": 1.0 - 1e-9, "t_max": 1.0, **diffusion},
    )
    work = workload_of(config, document_length)
    predicted = flops_per_token(config, work)
    ((parts, total),) = run_distributed(_counted, 1, config, document_length, process_group=False)
    tokens = LENGTH * NUM_SAMPLES
    # The dense kernel computes every pair, visible or not.
    dense = predicted["attention_core"] / work.visible_share
    for part, flops in parts.items():
        expected = dense if part == "attention_core" else predicted[part]
        assert flops / tokens == pytest.approx(expected, rel=1e-12), part
    assert total == sum(parts.values())
    assert total / tokens == pytest.approx(predicted["total"] - predicted["attention_core"] + dense, rel=1e-12)


def test_an_objective_that_measures_the_model_has_one_more_forward_pass():
    plain, confident = (tiny_config(diffusion={"confidence_weight": weight}) for weight in (0.0, 2.0))
    once, twice = (flops_per_token(config, workload_of(config)) for config in (plain, confident))
    for part in ("attention_projections", "attention_core", "mlp", "adaln", "output_head"):
        assert 3 * twice[part] == pytest.approx(4 * once[part], rel=1e-12), part


@pytest.mark.parametrize("document_length", [1, 7, 16, 24, LENGTH])
@pytest.mark.parametrize(
    "diffusion",
    [
        {},
        {"objective": "autoregressive"},
        {"block_size": 1},
        {"block_size": 16},
        {"block_size": 16, "block_index": "sample"},
        {"block_size": 16, "clean_attention": "token_causal", "autoregressive_weight": 0.5},
        {"block_size": 16, "clean_attention": "token_causal", "noisy_attention": "causal", "block_index": "sample"},
        {"block_size": LENGTH},
    ],
    ids=str,
)
def test_visible_pairs_are_those_of_the_mask(document_length, diffusion):
    config = tiny_config(data={"sequence_length": LENGTH}, diffusion={"random_length_probability": 0.0, **diffusion})
    noisy = corrupt(_batch(document_length), config.diffusion, 0)
    visibility = sequence_visibility(noisy, config, num_streams(config))
    work = workload_of(config, document_length)
    assert work.num_streams == num_streams(config)
    assert NUM_SAMPLES * work.visible_pairs == int(visibility.num_visible_pairs())
    assert NUM_SAMPLES * work.num_positions == visibility.endpoints.shape[1] * visibility.endpoints.shape[2]
