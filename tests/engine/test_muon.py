"""Muon against torch's own Muon and AdamW, on whole matrices and in every layout; its logical matrices, owners and rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.parallel import layouts
from tests.parallel.layouts import micro_batches, open_gates, train_layout, whole_tensors, world_size
from tests.parallel.test_layouts import layout_config
from tests.slow import LONGER_THAN_A_TEST, slow_except
from tests.tiny import LENGTH, VOCAB_SIZE, packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.checkpoints.format.shard_reader import Shards  # noqa: E402
from w1train.config.schema import Config  # noqa: E402
from w1train.config.schema_model import ExpertsConfig  # noqa: E402
from w1train.data.batch import PackedBatch  # noqa: E402
from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine import buckets  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.engine.gradients import prepare_gradients, step_with_prepared_gradients  # noqa: E402
from w1train.engine.matrices import fusion, is_matrix, owners, rounds, shared_ranges  # noqa: E402
from w1train.engine.muon import orthogonalize, orthogonalize_shards, update_scale  # noqa: E402
from w1train.model.initialization import global_named_parameters  # noqa: E402
from w1train.planning.layout import chunks_of, layout_of  # noqa: E402
from w1train.planning.orthogonalization import muon_work  # noqa: E402
from w1train.planning.parameters import chunk_parameters  # noqa: E402
from w1train.runtime.distributed import Ranks, distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402

NUM_STEPS, RATE = 3, 0.02
OPTIMIZER = {"name": "muon", "momentum": 0.8, "weight_decay": 0.7, "clip_grad": 0.3, "epsilon": 1e-2, "rate_multipliers": {"*.mlp.*": 0.5}}
SCALES = {"moonlight": "match_rms_adamw", "original": "original"}
"""Names of the scales, each with torch's name of it."""

Parameters = dict[str, torch.Tensor]


def _config(data_parallel: int = 1, scale: str = "moonlight", **parallel) -> Config:
    """Two heads a group, so that the fused matrix of queries, keys and values has groups of four heads."""
    config = layout_config("one-stream", data_parallel, num_layers=2, **parallel)
    config.model.num_query_groups = 2
    config.model.qkv_bias = True
    config.optimizer = dataclasses.replace(config.optimizer, **OPTIMIZER, update_scale=scale)
    return config


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_updates_of_a_matrix_are_torchs(shape, scale, precision):
    """torch computes in bf16; in float32 the numbers are near. The direction after the first step is a small multiple of the gradient."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parameter = torch.zeros(shape, requires_grad=True)
    parameter.grad = gradient.clone()
    torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, adjust_lr_fn=SCALES[scale]).step()
    direction = gradient.lerp(torch.zeros(shape).lerp_(gradient, 1 - 0.95), 0.95)
    found = -orthogonalize(direction, precision) * update_scale(shape, scale)
    tolerance = 1e-6 if precision == torch.bfloat16 else 0.05
    torch.testing.assert_close(found, parameter.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(3, 8), (16, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalize(matrix, torch.float32) @ right.T
    assert values.min() > 0.02 * values.norm(), "the iteration needs more steps for smaller values"
    assert ((inner.diagonal() > 0.65) & (inner.diagonal() < 1.25)).all()
    torch.testing.assert_close(inner, inner.diagonal().diag(), rtol=0, atol=1e-4)


def test_a_gradient_of_zero_moves_nothing():
    assert torch.equal(orthogonalize(torch.zeros(3, 4), torch.float32), torch.zeros(3, 4))


NAMES = {
    "decoder.layers.0.self_attention.linear_qkv.weight": (48, 16),
    "decoder.layers.1.mlp.linear_fc1.weight": (24, 16),
    "decoder.layers.0.mlp.linear_fc2.weight": (16, 12),
    "decoder.layers.0.self_attention.linear_proj.weight": (16, 32),
}
MODEL = dataclasses.replace(tiny_config().model, num_attention_heads=8, num_query_groups=4, kv_channels=3)


def _logical(name: str, whole: torch.Tensor) -> list[torch.Tensor]:
    """Written down from megatron-core's layouts: queries of a group, its key, its value, for each group; gate, then up."""
    if "qkv" in name:
        grouped = whole.view(4, 2 + 1 + 1, 3, 16)
        return [grouped[:, :2].reshape(24, 16), grouped[:, 2].reshape(12, 16), grouped[:, 3].reshape(12, 16)]
    return [whole[:12], whole[12:]] if "fc1" in name else [whole]


@pytest.mark.parametrize("num_tensor", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_fused_matrices_are_orthogonalized_apart(name, num_tensor):
    whole = torch.randn(NAMES[name], generator=torch.Generator().manual_seed(2))
    if "fc1" in name:
        gate, up = whole.chunk(2)
        shards = [torch.cat(pair) for pair in zip(gate.chunk(num_tensor), up.chunk(num_tensor), strict=True)]
    else:
        shards = list(whole.chunk(num_tensor, dim=0 if "qkv" in name else 1))
    shards = [shard.contiguous() for shard in shards]
    parts = fusion(name, len(shards[0]), MODEL)
    updates = orthogonalize_shards(shards, parts, "original", torch.float32)
    if "fc1" in name:
        halves = [update.chunk(2) for update in updates]
        found = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    else:
        found = torch.cat(updates, dim=0 if "qkv" in name else 1)
    for update, matrix in zip(_logical(name, found), _logical(name, whole), strict=True):
        torch.testing.assert_close(update, orthogonalize(matrix, torch.float32) * update_scale(matrix.shape, "original"))


def test_owners_hold_most_and_share_the_work():
    ranges = [[(0, 4), (4, 10)], [(0, 6), (6, 6)], [(0, 6), (6, 6)], [(0, 3), (3, 6)]]
    assert owners(ranges, [5, 5, 5, 3], num_tensor=2) == [2, 0, 1, 3]
    assert rounds([2, 0, 2, 2, 1]) == [[0, 1, 4], [2], [3]]


def test_ranges_are_the_parts_of_the_shares():
    assert shared_ranges(130, 290, bucket_start=100, share=100, num_shares=3) == [(0, 70), (70, 160), (160, 160)]


def _steps(config: Config, ranks: Ranks) -> Iterator[torch.nn.Module]:
    """Train the product, and yield its stage before each update and after the last."""
    model = build_trained_model(config)
    open_gates(model)
    for step in range(NUM_STEPS):
        batches = list(micro_batches(config, step, ranks.data_parallel_rank, ranks.data_parallel_size))
        model.zero_gradients()
        run_micro_batches(config, list(model.chunks), iter(batches), len(batches), training=True)
        yield model
        for group in model.optimizer.param_groups:
            group["lr"] = RATE * group["lr_mult"]
        step_with_prepared_gradients(model.optimizer, prepare_gradients(model.optimizer))
    model.gather_parameters()
    yield model


def _by_the_product(_rank: int, _size: int, config: Config) -> tuple[Parameters, list[int]]:
    """Return (parameters after the last step, bytes that this rank sends to others in each exchange)."""
    sent = []
    original = dist.all_to_all_single

    def counted(output, flat, *sizes, group, **sizes_of_dispatcher):
        if sizes:
            sent.append(4 * (sum(sizes[1]) - sizes[1][dist.get_rank(group)]))
        return original(output, flat, *sizes, group=group, **sizes_of_dispatcher)

    dist.all_to_all_single = counted
    try:
        with distributed(config.parallel) as ranks:
            *_, model = _steps(config, ranks)
            return whole_tensors(model, lambda parameter: parameter.data), sent
    finally:
        dist.all_to_all_single = original


def _by_torch(_rank: int, _size: int, config: Config) -> tuple[Parameters, Parameters]:
    """Return (parameters at first, after the last step), from torch.optim.AdamW and Muon's published update in float32, on the product's
    gradients at its own weights, which are compared at the end."""
    with distributed(config.parallel) as ranks:
        start: Parameters = {}
        twins: dict[str, torch.nn.Parameter] = {}
        momenta: Parameters = {}
        for model in _steps(config, ranks):
            named = dict(global_named_parameters(model.stages[0]))
            if not start:
                start = {name: parameter.detach().clone() for name, parameter in named.items()}
                twins = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
                adamw = torch.optim.AdamW(_adamw_groups(twins, config), betas=(0.9, 0.95), eps=OPTIMIZER["epsilon"])
                number = 0
            if number == NUM_STEPS:
                return start, {name: twin.detach() for name, twin in twins.items()}
            number += 1
            for name, twin in twins.items():
                twin.grad = named[name].main_grad.clone()
            torch.nn.utils.clip_grad_norm_(list(twins.values()), OPTIMIZER["clip_grad"])
            adamw.step()
            for name, twin in twins.items():
                if is_matrix(name):
                    momenta[name] = OPTIMIZER["momentum"] * momenta.get(name, 0) + twin.grad
                    direction = twin.grad + OPTIMIZER["momentum"] * momenta[name]
                    rate = RATE * (0.5 if ".mlp." in name else 1.0)
                    update = _published(name, direction, config)
                    twin.data = twin.data * (1 - rate * OPTIMIZER["weight_decay"]) - rate * update
        raise AssertionError("the steps ended early")


def _adamw_groups(twins: dict[str, torch.nn.Parameter], config: Config) -> list[dict]:
    others = [twin for name, twin in twins.items() if not is_matrix(name)]
    return [
        {"params": [twin for twin in others if (twin.dim() > 1) == decays], "lr": RATE, "weight_decay": OPTIMIZER["weight_decay"] * decays}
        for decays in (True, False)
    ]


def _published(name: str, direction: torch.Tensor, config: Config) -> torch.Tensor:
    """The update of the paper, of each logical matrix."""
    if ".experts." in name:
        own_name = name.replace(".experts.", ".")
        return torch.stack([_published(own_name, each.flatten(0, -2), config).view_as(each) for each in direction])
    model = config.model
    channels = model.kv_channels
    per_group = model.num_attention_heads // model.num_query_groups + 2
    update = torch.empty_like(direction)
    if "linear_qkv" in name:
        rows = torch.arange(len(direction)).view(model.num_query_groups, per_group, channels)
        pieces = [rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()]
    else:
        pieces = list(torch.arange(len(direction)).chunk(2 if "linear_fc1" in name else 1))
    for rows in pieces:
        x = direction[rows] / direction[rows].norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        update[rows] = 0.2 * max(x.shape) ** 0.5 * x
    return update


@pytest.fixture(scope="module")
def expected() -> tuple[Parameters, Parameters]:
    return run_distributed(_by_torch, 1, _config(distributed_optimizer=False), process_group=False)[0]


TOLERANCE = 1e-3


def _distance(found: Parameters, wanted: Parameters, start: Parameters) -> float:
    """The largest relative error of what the updates changed, over the parameters."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / (wanted[name] - start[name]).norm()) for name in wanted)


LAYOUTS = [
    ({"distributed_optimizer": False}, 1),
    ({}, 1),
    ({}, 2),
    ({"tensor": 2, "sequence": True}, 2),
    ({"tensor": 2, "pipeline": 2, "distributed_optimizer": False}, 1),
    ({"overlap_grad_reduce": True, "overlap_param_gather": True}, 4),
    ({"tensor": 2, "context": 2, "context_chunk_size": 4}, 1),
]


@pytest.mark.parametrize("layout", slow_except((LAYOUTS[0], LAYOUTS[3]), LAYOUTS), ids=str)
def test_updates_are_the_published_ones_in_every_layout(layout, expected, monkeypatch):
    """The buckets are small, so that many matrices are cut at the borders of the data-parallel ranks' shares."""
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE", 4000)
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE_PER_RANK", 1)
    parallel, data_parallel = layout
    config = _config(data_parallel, **parallel)
    size = world_size(config, data_parallel)
    results = run_distributed(_by_the_product, size, config, process_group=False)
    start, wanted = expected
    assert _distance(results[0][0], wanted, start) <= TOLERANCE
    plan = layout_of(config, size)
    for stage in range(plan.pipeline):
        chunks = [chunk_parameters(config.model, plan, chunk) for chunk in chunks_of(plan, stage)]
        planned = muon_work(config.model, plan, stage, chunks).traffic
        of_stage = [sent for rank, (_, sent) in enumerate(results) if plan.coordinates(rank).pipeline == stage]
        assert [(item.num_calls, item.tensor_bytes) for item in planned] == [
            (len(of_stage[0]) // NUM_STEPS, max(map(sum, of_stage)) // NUM_STEPS) for _ in planned
        ]
        assert bool(planned) == (plan.tensor * data_parallel > 1) == bool(of_stage[0])


def _expert_config(data_parallel: int = 1, **parallel) -> Config:
    """A dense layer, and a layer with experts."""
    config = _config(data_parallel, **parallel)
    settings = {"num_experts": 4, "num_active": 2, "ffn_hidden_size": 16, "shared_ffn_hidden_size": 24, "num_dense_layers": 1}
    config.model.experts = ExpertsConfig(**settings)
    config.optimizer.rate_multipliers = {"*.mlp.router.*": 1.0, **config.optimizer.rate_multipliers}
    return config


@pytest.fixture(scope="module")
def expected_with_experts() -> tuple[Parameters, Parameters]:
    return run_distributed(_by_torch, 1, _expert_config(distributed_optimizer=False), process_group=False)[0]


EXPERT_LAYOUTS = [
    ({"distributed_optimizer": False}, 1),
    ({}, 2),
    ({"expert": 2}, 4),
    ({"tensor": 2, "sequence": True, "expert_tensor": 2}, 1),
    ({"tensor": 2, "sequence": True, "expert": 2, "distributed_optimizer": False}, 1),
    ({"tensor": 2, "sequence": True, "expert_tensor": 2, "expert": 2}, 2),
    ({"tensor": 2, "sequence": True, "expert_tensor": 2, "expert": 2, "distributed_optimizer": False}, 2),
    ({"pipeline": 2, "expert": 2}, 2),
]


@pytest.mark.parametrize("layout", slow_except([EXPERT_LAYOUTS[2]], EXPERT_LAYOUTS), ids=str)
def test_each_matrix_of_each_expert_is_orthogonalized_for_itself(layout, expected_with_experts):
    """Two of these ranks share an expert's matrices, or a rank has several experts."""
    parallel, data_parallel = layout
    config = _expert_config(data_parallel, **parallel)
    results = run_distributed(_by_the_product, world_size(config, data_parallel), config, process_group=False)
    start, wanted = expected_with_experts
    assert sum(".mlp.experts." in name and is_matrix(name) for name in start) == 2
    assert _distance(results[0][0], wanted, start) <= TOLERANCE
    _check_plan(config, results)


def _check_plan(config: Config, results: list) -> None:
    """Compare the elements that the ranks of each pipeline stage exchange with the plan."""
    plan = layout_of(config, len(results))
    for stage in range(plan.pipeline):
        chunks = [chunk_parameters(config.model, plan, chunk) for chunk in chunks_of(plan, stage)]
        planned = muon_work(config.model, plan, stage, chunks).traffic
        of_stage = [sent for rank, (_, sent) in enumerate(results) if plan.coordinates(rank).pipeline == stage]
        assert sum(item.num_calls for item in planned) == len(of_stage[0]) // NUM_STEPS
        most = max(map(sum, of_stage)) // NUM_STEPS
        # The rank that has most of one kind of matrix need not have most of the other.
        assert most <= sum(item.tensor_bytes for item in planned)
        assert len(planned) > 1 or most == sum(item.tensor_bytes for item in planned)


CHANGES = [{"momentum": 0.7}, {"update_scale": "original"}, {"weight_decay": 0.6}, {"rate_multipliers": {}}]


@pytest.mark.parametrize("change", slow_except(CHANGES[:1], CHANGES), ids=str)
def test_another_setting_shows(change, expected):
    """The comparison would notice a setting that is not used as it is meant."""
    start, wanted = expected
    config = _config(distributed_optimizer=False)
    config.optimizer = dataclasses.replace(config.optimizer, **change)
    ((found, _),) = run_distributed(_by_the_product, 1, config, process_group=False)
    assert _distance(found, wanted, start) > 10 * TOLERANCE


RESUMED = [
    (({"tensor": 2, "sequence": True}, 2), [({"tensor": 2, "sequence": True}, 2), ({"pipeline": 2, "virtual_pipeline": 2}, 1)]),
    (({"tensor": 2, "distributed_optimizer": False}, 1), [({"pipeline": 2, "distributed_optimizer": False}, 1)]),
]


@pytest.mark.parametrize("runs", slow_except([], RESUMED), ids=str)
def test_resumed_and_resharded_runs_go_on_with_the_momentum(runs, tmp_path, monkeypatch):
    saved, loaded = runs
    monkeypatch.setattr(layouts, "LEARNING_RATE", RATE)

    def train(layout, **how):
        parallel, data = layout
        config = layout_config("one-stream", data, **parallel)
        config.optimizer = dataclasses.replace(config.optimizer, **OPTIMIZER)
        return train_layout(config, data, **how)

    start = train(saved, num_steps=0).parameters
    straight = train(saved, num_steps=4)
    train(saved, num_steps=2, save=tmp_path)
    path = tmp_path / "step_0000000002"
    names = Shards(path).tensors
    assert any("exp_avg.decoder.layers.mlp.linear_fc2.weight" in name for name in names)
    assert not any("exp_avg_sq" in name and ".linear_fc2.weight" in name for name in names)
    for layout in loaded:
        after = train(layout, num_steps=2, load=path)
        if layout == saved:
            assert after.losses == straight.losses[2:]
            assert all(torch.equal(after.parameters[name], value) for name, value in straight.parameters.items())
        assert after.losses == pytest.approx(straight.losses[2:], rel=1e-5)
        assert _distance(after.parameters, straight.parameters, start) <= TOLERANCE


@pytest.mark.slow
def test_momenta_of_experts_go_on_in_another_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "LEARNING_RATE", RATE)
    start = train_layout(_expert_config(), num_steps=0).parameters
    straight = train_layout(_expert_config(), num_steps=4)
    train_layout(_expert_config(2, expert=2), 2, num_steps=2, save=tmp_path)
    path = tmp_path / "step_0000000002"
    states = [name.split(".mlp.")[0] for name in Shards(path).tensors if name.endswith("mlp.experts.linear_fc2.weight")]
    assert sorted(name.split(".")[2] for name in states if name.startswith("optimizer.")) == ["exp_avg", "param"]
    after = train_layout(_expert_config(tensor=2, sequence=True, expert_tensor=2), num_steps=2, load=path)
    assert after.losses == pytest.approx(straight.losses[2:], rel=1e-5)
    assert _distance(after.parameters, straight.parameters, start) <= TOLERANCE


def _text(sample_indices: range) -> PackedBatch:
    """Texts of a random chain, in which three words follow each word: something to learn."""
    chain = torch.randint(16, VOCAB_SIZE, (VOCAB_SIZE, 3), generator=torch.Generator().manual_seed(0))
    batch = packed_batch(sample_indices)
    for row, index in enumerate(sample_indices):
        choices = torch.randint(3, (LENGTH,), generator=torch.Generator().manual_seed(index))
        for place in range(1, LENGTH):
            batch.tokens[row, place] = chain[batch.tokens[row, place - 1], choices[place]]
    return batch


def _learned(_rank: int, _size: int, name: str, rates: Sequence[float]) -> list[float]:
    """The negative ELBO of texts that were not trained, for each learning rate."""
    found = []
    for rate in rates:
        config = tiny_config(optimizer={"name": name}, model={"hidden_size": 64})
        with distributed(config.parallel):
            model = build_trained_model(config)
            for step in range(200):
                batches = [corrupt(_text(range(8 * step, 8 * step + 8)), config.diffusion, config.training.seed)]
                model.zero_gradients()
                run_micro_batches(config, list(model.chunks), iter(batches), 1, training=True)
                for group in model.optimizer.param_groups:
                    group["lr"] = rate * min(1, (step + 1) / 20) * min(1, (200 - step) / 100) * group["lr_mult"]
                step_with_prepared_gradients(model.optimizer, prepare_gradients(model.optimizer))
            batches = [corrupt(_text(range(10_000, 10_064)), config.diffusion, config.training.seed)]
            found.append(run_micro_batches(config, list(model.chunks), iter(batches), 1, training=False)[0]["elbo"])
    return found


@pytest.mark.slow
def test_a_tiny_model_learns_at_least_as_much_as_with_adamw():
    """Each optimizer takes as many steps, with the best of its learning rates."""
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    adamw, muon = (
        run_distributed(_learned, 1, name, rates, process_group=False, timeout=LONGER_THAN_A_TEST)[0] for name in ("adamw", "muon")
    )
    assert min(muon) <= min(adamw), (muon, adamw)
