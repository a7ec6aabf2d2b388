"""The hash of a frozen model: the same in every layout, and another after any change."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.tiny import tiny_config, tiny_experts
from w1train.config.schema import Config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.checkpoints.manifest import Progress  # noqa: E402
from w1train.config.errors import UserError  # noqa: E402
from w1train.data.dataset import DatasetError  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.companions import FrozenModel, build_reference, require_unchanged  # noqa: E402
from w1train.training.dataset_kinds import check_kinds, check_validation_kind  # noqa: E402

DENSE = {"tie_embeddings": True}


def _config(model: dict, **parallel: object) -> Config:
    return tiny_config(model=model, parallel=parallel)


def _hashes(_rank: int, _size: int, configs: list[Config]) -> list[str]:
    with distributed(configs[0].parallel):
        return [FrozenModel(config, lambda stages: None, "random weights").sha256 for config in configs]


def _in_layout(size: int, **parallel: object) -> list[str]:
    experts = {} if parallel.get("pipeline", 1) > 1 else {**tiny_experts(), "num_layers": 2}
    configs = [_config(DENSE, **parallel), _config(experts, **parallel)]
    results = run_distributed(_hashes, size, configs, process_group=False)
    assert all(result == results[0] for result in results), "all ranks have the same hash"
    return results[0]


def test_the_hash_does_not_depend_on_the_layout():
    single = _in_layout(1)
    assert single[0] != single[1]
    assert _in_layout(2, tensor=2, sequence=True) == single
    assert _in_layout(2, pipeline=2)[0] == single[0], "a tied head is a copy on the last stage"


@pytest.mark.slow
def test_the_hash_of_experts_does_not_depend_on_the_ranks_that_have_them():
    single = _in_layout(1)
    assert _in_layout(2, expert=2) == single
    assert _in_layout(4, tensor=2, sequence=True, expert=2) == single


def _changes(_rank: int, _size: int) -> None:
    config = _config(DENSE)
    with distributed(config.parallel):
        model = FrozenModel(config, lambda stages: None, "random weights")
        assert not any(parameter.requires_grad for chunk in model.chunks for parameter in chunk.parameters())
        assert not any(chunk.training for chunk in model.chunks)
        require_unchanged(model)
        parameter = next(parameter for parameter in model.chunks[0].parameters() if parameter.dim() == 2)
        parameter[1, 1] = torch.nextafter(parameter[1, 1], torch.tensor(1.0))
        with pytest.raises(RuntimeError, match="have changed in memory"):
            require_unchanged(model)


def test_the_last_bit_of_one_weight_changes_the_hash():
    run_distributed(_changes, 1, process_group=False)


def _built(_rank: int, _size: int, weights: str) -> None:
    config = _config(DENSE)
    model: Any = None  # it is not looked at
    with distributed(config.parallel):
        assert build_reference(config, model, lambda _: pytest.fail("a run without preferences has no reference"), Progress()) is None
        config.diffusion.preference_draws, config.reference.weights = 1, weights
        opened = []

        def open_weights(of_reference: Config):
            opened.append(of_reference.training.initial_weights)
            return lambda stages: None

        progress = Progress()
        reference = build_reference(config, model, open_weights, progress)
        assert reference is not None
        assert opened == [weights]
        assert progress.reference == {"weights": weights, "sha256": reference.sha256}
        build_reference(config, model, open_weights, progress)
        progress.reference["sha256"] = "0" * 64
        with pytest.raises(UserError, match=r"reference.weights: the weights of .* have changed since the run began"):
            build_reference(config, model, open_weights, progress)


def test_the_weights_must_be_those_that_the_run_began_with(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    run_distributed(partial(_built, weights=str(tmp_path)), 1, process_group=False)


@pytest.mark.parametrize(("kind", "num_draws", "words"), [("conversations", 1, "needs pairs"), ("preferences", 0, "learn the rejected")])
def test_the_kind_of_a_dataset_must_fit_the_objective(kind, num_draws, words):
    config = _config(DENSE)
    config.diffusion.preference_draws = num_draws
    datasets: Any = {"unused": SimpleNamespace(manifest=SimpleNamespace(conversations={"kind": kind}))}
    with pytest.raises(DatasetError, match=words):
        check_kinds(config, datasets, {name: ["unused"] for name in config.schedule.stages})
    config.diffusion.preference_draws = 1 - num_draws
    check_kinds(config, datasets, {name: ["unused"] for name in config.schedule.stages})


def test_replies_before_other_turns_need_blocks():
    config = _config(DENSE)
    datasets: Any = {"unused": SimpleNamespace(manifest=SimpleNamespace(conversations={"kind": "conversations", "replies": "all"}))}
    with pytest.raises(DatasetError, match=r"a reply sees the turns after it: set diffusion\.block_size .* --replies last"):
        check_kinds(config, datasets, {name: ["unused"] for name in config.schedule.stages})
    config.diffusion.block_size = 8
    check_kinds(config, datasets, {name: ["unused"] for name in config.schedule.stages})


@pytest.mark.parametrize(
    ("kind", "limits_noise", "num_draws", "words"),
    [("conversations", True, 1, "has no pairs"), (None, False, 1, "has no pairs"), ("preferences", True, 0, "has pairs of replies")],
)
def test_the_kind_of_a_validation_set_must_fit_the_objectives(kind, limits_noise, num_draws, words):
    config = _config(DENSE)
    config.diffusion.preference_draws = num_draws
    dataset: Any = SimpleNamespace(manifest=SimpleNamespace(conversations={"kind": kind} if kind else {}), limits_noise=limits_noise)
    with pytest.raises(DatasetError, match=words):
        check_validation_kind(config, "held_out", dataset)
    config.diffusion.preference_draws = 1 - num_draws
    check_validation_kind(config, "held_out", dataset)
