"""What the switches of kernels, FP8 and transformer-engine become in megatron-core's configuration, and their errors."""

import logging

import pytest
import torch

from tests.tiny import tiny_config
from w1train.config.errors import UserError
from w1train.config.schema import KernelsConfig
from w1train.model import linears as linears_module
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.engine import adamw  # noqa: E402
from w1train.kernels.selection import MAX_ROW  # noqa: E402
from w1train.model import fusions  # noqa: E402
from w1train.model.linears import linears  # noqa: E402
from w1train.model.megatron_config import transformer_config  # noqa: E402
from w1train.runtime import kernel_choices  # noqa: E402

needs_te = pytest.mark.skipif(not linears_module.has_transformer_engine(), reason="transformer-engine is not installed")
without_te = pytest.mark.skipif(linears_module.has_transformer_engine(), reason="transformer-engine is installed")


def _megatron(kernels=None, fp8="none", **sections):
    config = tiny_config(**sections)
    return transformer_config(config.model, config.parallel, "bf16", KernelsConfig(**(kernels or {})), fp8)


def test_on_the_cpu_nothing_is_fused_and_the_log_says_why(caplog):
    kernel_choices._choices.clear()
    with caplog.at_level(logging.INFO):
        megatron = _megatron()
    assert [megatron.apply_rope_fusion, megatron.bias_activation_fusion, megatron.gradient_accumulation_fusion] == [False] * 3
    assert "kernels.rope: unfused (Triton's kernels need CUDA)" in caplog.messages
    assert "kernels.elementwise: plain PyTorch" in caplog.messages
    assert len(caplog.messages) == 4


@pytest.mark.parametrize(
    ("field", "value"), [("elementwise", "triton"), ("rope", "fused"), ("swiglu", "fused"), ("gradient_accumulation", "fused")]
)
def test_what_cannot_run_here_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"kernels\.{field} is {value}, but .*CUDA.*; set kernels\.{field}=auto or "):
        _megatron({field: value})


def test_on_cuda_what_is_there_is_fused(monkeypatch):
    """The choice alone, with the machine's answers given to it: the rotary kernel takes the place of transformer-engine's."""
    monkeypatch.setattr(fusions, "has_triton", lambda: True)
    monkeypatch.setattr(fusions, "find_spec", lambda _name: None)
    monkeypatch.setattr(fusions.rope_utils, "fused_apply_rotary_pos_emb", None)
    chosen = fusions.choose_fusions(KernelsConfig(), tiny_config().model, on_cuda=True)
    assert chosen == fusions.Fusions(rope=True, swiglu=True, gradient_accumulation=False)
    assert fusions.rope_utils.fused_apply_rotary_pos_emb is fusions.apply_rotary
    unfused = KernelsConfig(rope="unfused", swiglu="unfused", gradient_accumulation="unfused")
    assert fusions.choose_fusions(unfused, tiny_config().model, on_cuda=True) == fusions.Fusions(False, False, False)
    monkeypatch.setattr(fusions, "find_spec", lambda name: name)
    assert fusions.choose_fusions(KernelsConfig(), tiny_config().model, on_cuda=True).gradient_accumulation


def test_rows_that_no_program_holds_are_said_and_refused(monkeypatch, caplog):
    monkeypatch.setattr(fusions, "has_triton", lambda: True)
    kernel_choices._choices.clear()
    with caplog.at_level(logging.INFO):
        for hidden_size in (MAX_ROW, MAX_ROW + 8):
            fusions.describe_elementwise(KernelsConfig(), hidden_size, on_cuda=True)
    why = f"model.hidden_size is {MAX_ROW + 8}, and a program holds {MAX_ROW} elements at most"
    assert caplog.messages == [
        "kernels.elementwise: triton",
        f"kernels.elementwise: triton in the loss, plain PyTorch in norms and gates ({why})",
    ]
    with pytest.raises(UserError, match=r"kernels\.elementwise is triton, but model\.hidden_size is 16392"):
        fusions.describe_elementwise(KernelsConfig(elementwise="triton"), MAX_ROW + 8, on_cuda=True)


@without_te
def test_transformer_engine_is_asked_for_by_name():
    with pytest.raises(UserError, match=r"model.transformer_impl is te, which needs transformer-engine.*set model.transformer_impl=local"):
        linears("te")
    with pytest.raises(UserError, match=r"training.fp8 is blockwise, which needs transformer-engine"):
        _megatron(fp8="blockwise")
    with pytest.raises(UserError, match=r"kernels.adamw is te, but transformer_engine.pytorch.optimizers cannot be imported"):
        adamw.install("te")


@pytest.mark.parametrize(
    ("fp8", "capability", "expected"),
    [
        ("none", (9, 0), {"fp8": None}),
        ("tensorwise", (8, 9), {"fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        ("blockwise", (9, 0), {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
        ("tensorwise", (8, 0), None),
        ("blockwise", (8, 9), None),
    ],
)
def test_fp8_settings(fp8, capability, expected, monkeypatch):
    monkeypatch.setattr(fusions, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if expected is None:
        with pytest.raises(UserError, match="needs compute capability"):
            fusions.fp8_settings(fp8)
    else:
        assert fusions.fp8_settings(fp8) == expected


def test_adamw_by_name():
    adamw.install("torch")
    assert adamw.megatron_optimizer.Adam is adamw.AdamW


@needs_te
@pytest.mark.gpu
def test_linears_of_transformer_engine_have_the_same_parameters():
    from tests.distributed import run_distributed

    def names(_rank, _size):
        from w1train.engine.building import build_stage
        from w1train.runtime.distributed import distributed

        found = []
        for implementation in ("local", "te"):
            config = tiny_config(model={"transformer_impl": implementation})
            with distributed(config.parallel):
                stage = build_stage(config, transformer_config(config.model, config.parallel, "bf16"))
                found.append({name: tuple(parameter.shape) for name, parameter in stage.named_parameters()})
        return found

    ((local, te),) = run_distributed(names, 1, timeout=120, process_group=False)
    assert local == te
