"""Predicted activation bytes against what autograd saves, in unique storages, on the real model."""

import pytest
import torch

from tests.distributed import run_distributed
from tests.tiny import packed_batch, tiny_config
from w1train.planning.activations import CPU_KERNELS, chunk_activation_bytes, sizes_of
from w1train.planning.layout import chunks_of, layout_of
from w1train.planning.workload import workload_of
from w1train.runtime.cpu import import_megatron

import_megatron()

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.model.megatron_config import transformer_config  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import _loss, model_inputs  # noqa: E402
from w1train.training.setup import build_stage  # noqa: E402

LENGTH = 64


def _config(**sections):
    sections.setdefault("diffusion", {})["random_length_probability"] = 0.0
    sections.setdefault("data", {})["sequence_length"] = LENGTH
    return tiny_config(**sections)


def _saved_bytes(rank, _world_size, config):
    """Unique storages that autograd keeps of one micro-batch, parameters left out, and the numbers of logits and segments."""
    with distributed(config.parallel):
        stage = build_stage(config, transformer_config(config.model, config.parallel, config.training.precision))
        parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                # The tensor is kept too, so that no other can come to lie at its address.
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        noisy = corrupt(packed_batch([0, 1], length=LENGTH), config.diffusion, 0)
        inputs = model_inputs(noisy, config.diffusion.timestep_per)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _loss(config, noisy, inputs, stage(inputs))
        return sum(size for size, _ in storages.values()), len(inputs.logit_positions), len(inputs.segment_timesteps)


def _check(config, world_size=1):
    layout = layout_of(config, world_size)
    measured, num_logits, num_segments = run_distributed(_saved_bytes, world_size, config, timeout=120, process_group=False)[0]
    by_document = config.diffusion.timestep_per == "document"
    work = workload_of(config, document_length=-(-LENGTH * layout.micro_batch_size // num_segments) if by_document else 16)
    sizes = sizes_of(config.model, layout, work, config.training.precision, segment_indexed=by_document, num_logits=num_logits)
    assert sizes.segments == num_segments
    (chunk,) = chunks_of(layout, config.model, 0)
    predicted = chunk_activation_bytes(sizes, CPU_KERNELS, layout, chunk).total
    assert predicted == pytest.approx(measured, rel=0.1), f"{predicted} {measured} {predicted / measured:.3f}"
    print(f"{predicted / measured:.4f}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_one_rank(precision, recompute, timestep_per, qk_norm):
    _check(
        _config(
            model={"qk_norm": qk_norm, "num_layers": 4},
            parallel={"recompute": recompute},
            diffusion={"timestep_per": timestep_per},
            training={"precision": precision},
        )
    )


@pytest.mark.parametrize("model", [{"conditioning": "none"}, {"num_query_groups": 2, "qk_norm": True}, {"tie_embeddings": True}], ids=str)
def test_switches(model):
    _check(_config(model=model, training={"precision": "bf16"}))


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_tensor_parallel(sequence, recompute):
    _check(_config(parallel={"tensor": 2, "sequence": sequence, "recompute": recompute}, training={"precision": "bf16"}), world_size=2)
