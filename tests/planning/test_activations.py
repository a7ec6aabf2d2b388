"""Predicted activation bytes, compared with the unique storages that autograd saves on the real model."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.distributed import run_distributed
from tests.slow import slow_except
from tests.tiny import packed_batch, tiny_config, tiny_experts
from w1train.planning.activations import CUDA_KERNELS, Kernels, chunk_activation_bytes, sizes_of
from w1train.planning.layout import chunks_of, layout_of
from w1train.planning.workload import workload_of
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import build_stage  # noqa: E402
from w1train.kernels import triton_modulation, triton_rotary  # noqa: E402
from w1train.kernels.rotary import apply_rotary  # noqa: E402
from w1train.model.megatron_config import transformer_config  # noqa: E402
from w1train.model.row_terms import CrossEntropy  # noqa: E402
from w1train.runtime import megatron_on_cpu as cpu  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import _loss, _work  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402

LENGTH = 64
CPU_KERNELS = Kernels(fused_norm=False, fused_swiglu=False, fused_rotary=False)


def _config(**sections):
    sections.setdefault("diffusion", {})["random_length_probability"] = 0.0
    sections.setdefault("data", {})["sequence_length"] = LENGTH
    # Fused attention on CUDA needs head channels that are a multiple of 8.
    sections["model"] = {"kv_channels": 16, **sections.get("model", {})}
    return tiny_config(**sections)


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Return the bytes of the unique storages that autograd keeps, without parameters."""

    def __init__(self, stage):
        self.parameters = {parameter.untyped_storage()._cdata for parameter in stage.parameters()}
        self.storages = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.parameters:
            # The tensor is kept as well, so that no other tensor gets its address.
            self.storages[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    @property
    def total(self):
        return sum(size for size, _ in self.storages.values())


def _inputs(config):
    return rank_inputs(corrupt(packed_batch([0, 1], length=LENGTH), config.diffusion, 0), config)


def _measure(_rank, _world_size, configs):
    """Return the result of ``_measure_chunks`` for each configuration. All of them have the same process groups."""
    with distributed(configs[0].parallel):
        return [_measure_chunks(config) for config in configs]


def _measure_chunks(config):
    """Return, for each chunk of this rank, the bytes saved and the numbers of logits and segments."""
    results = []
    megatron = transformer_config(config.model, config.parallel, config.training.precision)
    for vp_stage in range(config.parallel.virtual_pipeline):
        stage = build_stage(config, megatron, vp_stage)
        inputs = _inputs(config)
        num_samples, num_positions = inputs.model.input_ids.shape
        if not stage.pre_process:
            stage.set_input_tensor(torch.randn((num_positions, num_samples, config.model.hidden_size), requires_grad=True).bfloat16())
        saved = _SavedBytes(stage)
        with saved:
            output = stage(inputs.model, [CrossEntropy(inputs.targets)])
            if stage.post_process:
                _loss(config, inputs, _work(inputs), ["cross_entropy"], output)
        results.append((saved.total, len(inputs.model.logit_positions), len(inputs.model.segment_timesteps)))
    return results


def _predict(config, world_size, kernels, measured, rank=0):
    """Predict the bytes saved by each chunk of a rank, with the measured numbers of logits and segments."""
    layout = layout_of(config, world_size)
    # Several documents need a mask. Otherwise their number matters only for the number of segments.
    work = workload_of(config, 16)
    predictions = []
    for chunk, (_, num_logits, num_segments) in zip(chunks_of(layout, layout.coordinates(rank).pipeline), measured, strict=True):
        sizes = sizes_of(config.model, layout, work, config.training.precision, num_logits)
        sizes = dataclasses.replace(sizes, segments=num_segments)
        predictions.append(chunk_activation_bytes(sizes, kernels, layout, chunk).total)
    return predictions


BLOCKS = {"block_size": 4, "block_index": "sample"}
ONE_RANK = [
    _config(
        model={"qk_norm": qk_norm, "num_layers": 4},
        parallel={"recompute": recompute},
        diffusion={"timestep_per": timestep_per},
        training={"precision": precision},
    )
    for precision in ("fp32", "bf16")
    for recompute in ("none", "selective", "full")
    for timestep_per in ("sequence", "document")
    for qk_norm in (False, True)
] + [
    _config(model={"conditioning": "none"}),
    _config(model={"num_query_groups": 2, "qk_norm": True, "qkv_bias": True}),
    _config(model={"tie_embeddings": True, "num_layers": 6}, parallel={"recompute": "full", "recompute_num_layers": 2}),
    _config(diffusion={"block_size": 4}),
    _config(diffusion={"block_size": 4, "timestep_per": "block"}, training={"precision": "bf16"}),
    _config(training={"loss_chunk_size": 7}),
]
EXPERTS = [
    *(
        _config(model={"num_layers": 3, **tiny_experts(**experts)}, training={"precision": precision}, parallel={"recompute": recompute})
        for experts, precision, recompute in (
            ({}, "fp32", "none"),
            ({"score": "sigmoid"}, "bf16", "selective"),
            ({"normalize": False, "router_precision": "model"}, "bf16", "none"),
            ({"num_active": 1, "shared_ffn_hidden_size": 0}, "fp32", "none"),
            ({"score": "sigmoid", "num_active": 1}, "bf16", "full"),
        )
    ),
    *(
        _config(
            model={"num_layers": 3, **tiny_experts(score=score)},
            training={"precision": "bf16"},
            parallel={**layout, "expert_dispatcher": dispatcher},
        )
        for layout in ({"expert": 2}, {"tensor": 2, "sequence": True, "expert": 2}, {"tensor": 2, "sequence": True, "expert_tensor": 2})
        for score, dispatcher in (("sigmoid", "all_to_all"), ("softmax", "all_gather"))
    ),
    _config(model={"num_layers": 3, "conditioning": "none", **tiny_experts()}, diffusion={"block_size": 4}),
    _config(model={"num_layers": 3, "qk_norm": True, **tiny_experts(num_dense_layers=0)}),
    _config(model={"num_layers": 3, **tiny_experts()}, parallel={"recompute": "selective", "recompute_experts": True}),
]
TWO_RANKS = [
    *(
        _config(parallel={"tensor": 2, "sequence": sequence, "recompute": recompute}, training={"precision": "bf16"})
        for sequence in (False, True)
        for recompute in ("none", "full")
    ),
    _config(model={"num_layers": 4}, parallel={"pipeline": 2}, training={"precision": "bf16"}),
    _config(model={"num_layers": 4}, parallel={"pipeline": 2, "virtual_pipeline": 2}, training={"precision": "bf16"}),
    *(
        _config(
            model={"qk_norm": not diffusion},
            parallel={"context": 2, "context_method": method, "context_chunk_size": 16, "recompute": recompute},
            diffusion=diffusion,
            training={"precision": "bf16"},
        )
        for method, diffusion in (("all_gather", {}), ("all_gather", BLOCKS), ("all_to_all", {}), ("all_to_all", BLOCKS))
        for recompute in ("none", "selective")
    ),
]
TWO_RANK_NAMES = ["tensor", "tensor-full", "sequence", "sequence-full", "pipeline", "virtual"] + [
    f"context-{method}-{recompute}"
    for method in ("keys", "clean keys", "heads", "heads of two streams")
    for recompute in ("none", "selective")
]


@functools.cache
def _measured_experts(group_sizes):
    configs = [config for config in EXPERTS if _expert_group_sizes(config) == group_sizes]
    ranks = run_distributed(_measure, _world_size(configs[0]), configs, timeout=240, process_group=False)
    return {id(config): [measured[number] for measured in ranks] for number, config in enumerate(configs)}


def _expert_group_sizes(config):
    parallel = config.parallel
    return parallel.tensor, parallel.expert, parallel.expert_tensor


def _world_size(config):
    return max(config.parallel.tensor, config.parallel.expert)


@pytest.mark.parametrize("number", slow_except([0, 1, 2, 3, 4, 13], range(14)))
def test_experts(number):
    """All ranks together, because the rows of a rank depend on the choices of experts, and their sum does not."""
    config = EXPERTS[number]
    measured, world_size = _measured_experts(_expert_group_sizes(config))[id(config)], _world_size(config)
    predicted = sum(_predict(config, world_size, CPU_KERNELS, of_rank, rank)[0] for rank, of_rank in enumerate(measured))
    assert predicted == pytest.approx(sum(of_rank[0][0] for of_rank in measured), rel=0.02)


@functools.cache
def _measured_on_one_rank():
    """Measure all configurations in one fork."""
    return run_distributed(_measure, 1, ONE_RANK, timeout=240, process_group=False)[0]


def _name(config):
    parallel, model = config.parallel, config.model
    switches = [name for name in ("qk_norm", "tie_embeddings", "num_query_groups") if getattr(model, name)]
    if config.diffusion.block_size:
        switches.append("blocks")
    return "-".join([config.training.precision, parallel.recompute, config.diffusion.timestep_per, model.conditioning, *switches])


@pytest.mark.parametrize("number", range(len(ONE_RANK)), ids=[_name(config) for config in ONE_RANK])
def test_one_rank(number):
    measured = _measured_on_one_rank()[number]
    assert _predict(ONE_RANK[number], 1, CPU_KERNELS, measured) == pytest.approx([size for size, *_ in measured], rel=0.02)


def _group_sizes(config):
    parallel = config.parallel
    return parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context


@functools.cache
def _measured_on_two_ranks(group_sizes):
    """Measure all configurations that have these process groups in one fork. Return the numbers of each rank by configuration."""
    numbers = [number for number, config in enumerate(TWO_RANKS) if _group_sizes(config) == group_sizes]
    ranks = run_distributed(_measure, 2, [TWO_RANKS[number] for number in numbers], timeout=240, process_group=False)
    return {number: [measured[place] for measured in ranks] for place, number in enumerate(numbers)}


@pytest.mark.parametrize("number", range(len(TWO_RANKS)), ids=TWO_RANK_NAMES)
def test_two_ranks(number):
    config = TWO_RANKS[number]
    for rank, measured in enumerate(_measured_on_two_ranks(_group_sizes(config))[number]):
        assert _predict(config, 2, CPU_KERNELS, measured, rank) == pytest.approx([size for size, *_ in measured], rel=0.02), rank


# On CUDA other kernels run. Fake tensors (shapes, types and storages without numbers) show without a GPU what autograd saves there.


def _fused_attention(query, key, value, attn_mask=None, scale=None, enable_gqa=False):
    """Run the kernel that scaled_dot_product_attention chooses on CUDA, which it cannot choose without a GPU."""
    assert not enable_gqa
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device).masked_fill(~attn_mask, float("-inf"))
    bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, 0.0, False, scale=scale)[0]


def _on_fake_cuda(tensor):
    return torch.ops.aten.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=torch.device("cuda:0"))


def _move(instance):
    """Return the tensors of a dataclass and of the dataclasses in it."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, torch.Tensor):
            setattr(instance, field.name, _on_fake_cuda(value))
        elif dataclasses.is_dataclass(value):
            _move(value)


def _move_parameters(stage):
    for name, parameter in list(stage.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        moved = torch.nn.Parameter(_on_fake_cuda(parameter))
        moved.__dict__.update(parameter.__dict__)
        setattr(stage.get_submodule(owner), attribute, moved)


def _replace_triton():
    """Replace kernels by functions that compute nothing, because fake tensors hold no numbers."""
    triton_rotary.rotate = lambda t, angles, direction: torch.empty_like(t)
    triton_modulation.gate_forward = lambda residual, gate, x, index: torch.empty_like(x)
    triton_modulation.norm_forward = lambda x, *_: (torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32))


def _measure_on_fake_cuda(_rank, _world_size, config, masked):
    F.scaled_dot_product_attention = _fused_attention
    # megatron-core compiles SwiGLU, and compiled functions do not take fake tensors.
    torch.compiler.set_stance("force_eager")
    with distributed(config.parallel):
        megatron = transformer_config(config.model, config.parallel, config.training.precision)
        megatron.bias_activation_fusion = megatron.apply_rope_fusion = True
        rope_utils.fused_apply_rotary_pos_emb = apply_rotary
        _replace_triton()
        inputs = _inputs(config).model
        if not masked:
            inputs.attention_plan.kernel_plan.mask = None
        with torch.device("meta"):
            stage = build_stage(config, megatron)
        num_logits = len(inputs.logit_positions)
        cpu._is_cuda = lambda _device: False  # the fake CUDA device counts as CUDA here
        with FakeTensorMode(), torch.device("cuda"):
            _move_parameters(stage)
            _move(inputs)
            saved = _SavedBytes(stage)
            with saved:
                stage(inputs)
            return saved.total, num_logits, len(inputs.segment_timesteps)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("model", "timestep_per"),
    [({}, "sequence"), ({}, "document"), ({"qk_norm": True}, "document"), ({"conditioning": "none"}, "sequence")],
    ids=str,
)
def test_cuda_kernels(model, timestep_per, masked):
    config = _config(model=model, diffusion={"timestep_per": timestep_per}, training={"precision": "bf16"})
    (measured,) = run_distributed(_measure_on_fake_cuda, 1, config, masked, timeout=60, process_group=False)
    (predicted,) = _predict(config, 1, CUDA_KERNELS, [measured])
    if not masked:
        predicted -= config.model.num_layers * config.training.micro_batch_size * LENGTH**2 * 2
    # The loss needs collectives, which fake tensors do not support: the measurement lacks its probabilities, mask, index and weights.
    predicted -= measured[1] * (config.model.vocab_size * 4 + 1 + 8 + 4)
    assert predicted == pytest.approx(measured[0], rel=0.02)
