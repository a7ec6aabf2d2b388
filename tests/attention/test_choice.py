"""The choice of a backend: the order of auto, the reasons in the log, and an error instead of another backend."""

import logging

import pytest
import torch

from tests.tiny import tiny_config
from w1train.attention.backends import cudnn, interface, te
from w1train.attention.backends.choice import BACKENDS, choose_backend
from w1train.config.errors import UserError
from w1train.config.rules.attention_limits import AttentionCase, attention_case, limit
from w1train.config.rules.validate import validate
from w1train.config.stages import at_stage
from w1train.runtime import kernel_choices

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def _case(kind="blocks", **fields):
    return AttentionCase(**{"kind": kind, "precision": "bf16", "num_heads": 24, "num_groups": 24, "channels": 128, **fields})


@pytest.fixture
def machine(monkeypatch):
    """Pretends to be a machine with a GPU of some capability and some packages."""

    def pretend(capability, packages):
        choose_backend.cache_clear()
        kernel_choices._choices.clear()
        monkeypatch.setattr(interface.torch.cuda, "get_device_capability", lambda _device: capability)
        for module in (cudnn, te):
            monkeypatch.setattr(module, "find_spec", lambda name: name if name in packages else None)

    yield pretend
    choose_backend.cache_clear()


HOPPER = (9, 0)
CUDNN = {"cudnn", "cudnn.flex_attention", "cutlass"}
ALL = {*CUDNN, "transformer_engine"}


@pytest.mark.parametrize(
    ("capability", "packages", "case", "chosen"),
    [
        (HOPPER, ALL, _case(), "cudnn"),
        (HOPPER, set(), _case(), "flex"),
        ((10, 3), CUDNN, _case(), "cudnn"),
        ((12, 0), CUDNN, _case(), "flex"),
        ((8, 0), ALL, _case(), "flex"),
        ((7, 5), ALL, _case(), "sdpa"),
        (HOPPER, CUDNN, _case(precision="fp32"), "flex"),
        (HOPPER, CUDNN, _case(channels=192), "flex"),
        (HOPPER, CUDNN, _case(channels=256), "cudnn"),
        (HOPPER, CUDNN, _case(channels=12, precision="fp32"), "sdpa"),
        (HOPPER, ALL, _case("scattered"), "te"),
        (HOPPER, CUDNN, _case("scattered"), "sdpa"),
        (HOPPER, ALL, _case(context_method="all_gather"), "cudnn"),
    ],
)
def test_auto_takes_the_first_that_can(machine, capability, packages, case, chosen):
    machine(capability, packages)
    assert choose_backend("auto", case, GPU).name == chosen


def test_the_choice_is_logged_once_with_the_reasons(machine, caplog):
    machine(HOPPER, CUDNN - {"cudnn.flex_attention"})
    with caplog.at_level(logging.INFO):
        assert choose_backend("auto", _case(), GPU) is choose_backend("auto", _case(), GPU)
    (record,) = caplog.records
    assert "block diffusion" in record.message
    assert ": flex; not cudnn: it needs nvidia-cudnn-frontend >= 1.29 and nvidia-cutlass-dsl (pip install -e '.[cudnn]')" in record.message


@pytest.mark.parametrize(
    ("name", "case", "device", "reason"),
    [
        ("cudnn", _case(), CPU, "it needs a GPU, and runs on cpu"),
        ("flex", _case(), CPU, "it needs a GPU"),
        ("te", _case(), GPU, "it needs transformer-engine"),
        ("cudnn", _case("scattered"), GPU, "attention_annealing=random"),
        ("te", _case(context_method="all_gather"), GPU, "all_to_all"),
    ],
)
def test_a_named_backend_that_cannot_serve_is_an_error(machine, name, case, device, reason):
    machine(HOPPER, CUDNN)
    with pytest.raises(UserError, match=reason):
        choose_backend(name, case, device)


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_dense_kernels_serve_everything(name):
    for kind in ("documents", "causal", "extent", "scattered", "blocks"):
        assert choose_backend(name, _case(kind, channels=10, precision="fp32", context_method="all_gather"), CPU).name == name


def _problems(backend, **sections):
    config = tiny_config(**{"model": {"kv_channels": 64}, "training": {"precision": "bf16"}, **sections, "attention": {"backend": backend}})
    return {problem.key: problem.valid for problem in validate(config)}


def test_what_no_machine_can_do_is_a_problem_of_the_configuration():
    assert _problems("cudnn") == {}
    assert "bf16" in _problems("cudnn", training={"precision": "fp32"})["attention.backend"]
    assert "multiple of 8" in _problems("te", model={"kv_channels": 12})["attention.backend"]
    parallel = {"context": 2, "context_chunk_size": 8}
    assert "whole sequences" in _problems("te", diffusion={"block_size": 4}, parallel=parallel)["attention.backend"]
    assert _problems("flex", diffusion={"block_size": 4}, parallel=parallel) == {}


def test_a_stage_can_be_what_a_backend_cannot_serve():
    config = tiny_config(model={"kv_channels": 64}, training={"precision": "bf16"}, attention={"backend": "cudnn"})
    config.schedule.stages["all"].diffusion = {"attention_annealing": "random", "annealing_tokens": 100}
    (problem,) = validate(config)
    assert problem.key == "attention.backend in stage all"
    assert "attention_annealing=random" in problem.valid


def test_reported_with_all_other_problems():
    problems = _problems("cudnn", training={"precision": "fp32", "micro_batch_size": 3})
    assert set(problems) == {"attention.backend", "training.global_batch_size"}


def test_the_case_is_that_of_one_rank_at_one_stage():
    config = tiny_config(
        model={"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16},
        parallel={"tensor": 2, "context": 2, "context_method": "all_to_all"},
    )
    config.schedule.stages["all"].diffusion = {"block_size": 4}
    case = attention_case(at_stage(config, "all"), is_causal=False)
    assert (case.kind, case.num_heads, case.num_groups, case.channels) == ("blocks", 2, 1, 16)
    assert attention_case(config, is_causal=False).kind == "documents"
    assert not case.keys_travel


def test_every_backend_has_limits():
    assert all(limit(name, _case()) is None for name in BACKENDS)
