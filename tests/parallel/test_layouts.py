"""Every layout gives the single process's numbers: loss, gradients, parameters after three steps, and the very same noise.

The layouts that are not `slow` have each kind of parallelism alone, and all kinds together.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import pytest

from tests.parallel.layouts import NUM_STEPS, Outcome, train_layout, train_layouts
from tests.slow import slow_except
from tests.tiny import VOCAB_SIZE, tiny_config
from w1train.engine import buckets

STREAMS = {
    "one-stream": {"timestep_per": "document"},
    "two-stream": {"block_size": 4, "timestep_per": "block"},
    # Blocks that lie inside the chunks of context parallelism: noisy keys stay at home.
    "two-stream-aligned": {"block_size": 4, "block_index": "sample", "timestep_per": "block"},
}
GRID_STREAMS = ("one-stream", "two-stream")
SLOW = pytest.mark.slow
VIRTUAL = {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}
OBJECTIVES = {
    "autoregressive": {"objective": "autoregressive"},
    "annealed": {"attention_annealing": "extent", "annealing_tokens": 1000, "shift": True, "mask_embedding_noise": 0.5},
    "shifted-pairs": {"block_size": 4, "shift": True, "complementary": True, "weight": "inverse_fraction", "mask_embedding_noise": 0.5},
    "joint": {"block_size": 4, "clean_attention": "token_causal", "autoregressive_weight": 0.5, "normalizer": "masked_tokens"},
    "causal-blocks": {
        "block_size": 4,
        "clean_attention": "token_causal",
        "noisy_attention": "causal",
        "timestep_per": "document",
        "normalizer": "samples",
        "random_length_probability": 0.5,
    },
    "hybrid-blocks": {"objective": "hybrid", "num_noise_ids": VOCAB_SIZE, "t_max": 0.9999, "block_size": 4, "timestep_per": "block"},
    "uniform-documents": {"objective": "uniform", "num_noise_ids": VOCAB_SIZE, "t_max": 0.9999, "timestep_per": "document"},
}


def layout_config(streams: str, data_parallel: int = 1, *, num_layers: int = 4, **parallel):
    """Four layers, so that two stages of two chunks have one each; eight samples, of the objectives four, in as many micro-batches as the
    schedule needs on each rank: two to accumulate over, four to fill a pipeline (if there are samples for them)."""
    num_samples = 4 if streams in OBJECTIVES else 8
    num_micro_batches = 4 if parallel.get("pipeline", 1) > 1 else 2
    return tiny_config(
        model={"num_layers": num_layers, "qk_norm": True},
        parallel={"context_chunk_size": 4, **parallel},
        diffusion={**STREAMS, **OBJECTIVES}[streams],
        training={"global_batch_size": num_samples, "micro_batch_size": max(1, num_samples // (data_parallel * num_micro_batches))},
    )


def _layouts():
    for tensor, pipeline, virtual, context, data in itertools.product((1, 2), repeat=5):
        if tensor * pipeline * context * data <= 8 and not (virtual > 1 and pipeline == 1):
            yield {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "context": context}, data


def _name(layout):
    parallel, data = layout
    return f"tp{parallel['tensor']}-pp{parallel['pipeline']}-vpp{parallel['virtual_pipeline']}-cp{parallel['context']}-dp{data}"


LAYOUTS = list(_layouts())
# (tensor, pipeline, virtual pipeline, context, data)
_KEPT = {(2, 1, 1, 1, 1), (1, 2, 2, 1, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2), (2, 2, 2, 2, 1)}
IN_EACH_RUN = [layout for layout in LAYOUTS if (*layout[0].values(), layout[1]) in _KEPT]
_references: dict[tuple[str, int], Outcome] = {}


def reference(streams: str) -> Outcome:
    """The single process, computed once."""
    return references([streams])[0]


def references(names: Sequence[str], num_layers: int = 4) -> list[Outcome]:
    """``reference`` of each, those that are missing in one fork."""
    missing = [name for name in dict.fromkeys(names) if (name, num_layers) not in _references]
    if missing:
        outcomes = train_layouts([layout_config(name, num_layers=num_layers, distributed_optimizer=False) for name in missing])
        _references.update(zip([(name, num_layers) for name in missing], outcomes, strict=True))
    return [_references[name, num_layers] for name in names]


def assert_equal_numbers(outcome: Outcome, expected: Outcome, which: str = "") -> None:
    assert outcome.noise == expected.noise, f"corruption is bit-identical {which}"
    for step, (loss, wanted) in enumerate(zip(outcome.losses, expected.losses, strict=True)):
        assert abs(loss - wanted) <= 1e-6 * abs(wanted), f"loss of step {step}: {loss} instead of {wanted} {which}"
    assert outcome.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5), which
    for name, gradient in outcome.gradients.items():
        error = (gradient - expected.gradients[name]).norm() / expected.gradients[name].norm().clamp_min(1e-30)
        assert error <= 1e-5, f"gradient of {name}: relative error {error:.1e}"
    assert outcome.parameters.keys() == expected.parameters.keys()
    for name, parameter in outcome.parameters.items():
        error = (parameter - expected.parameters[name]).norm() / expected.parameters[name].norm()
        assert error <= 1e-6, f"{name} after the last step: relative error {error:.1e}"


def assert_equal_work(outcome: Outcome, expected: Outcome, *, same_micro_batches: bool) -> None:
    """FLOPs are counted once, on whichever ranks they are computed. Segments are counted in each micro-batch, so larger micro-batches have
    another number of them."""
    for work, wanted in zip(outcome.work, expected.work, strict=True):
        found = dataclasses.replace(work, context_balance=wanted.context_balance)
        assert work.context_balance >= wanted.context_balance == 1
        assert found == (wanted if same_micro_batches else dataclasses.replace(wanted, num_segments=work.num_segments))


def _assert_all_equal_the_single_process(names, parallel, data):
    """Each of the streams or objectives, on the same ranks. Without a pipeline two layers do: a first and a last one."""
    num_layers = 4 if parallel.get("pipeline", 1) > 1 else 2
    configs = [layout_config(name, data, num_layers=num_layers, **parallel, distributed_optimizer=False) for name in names]
    training = configs[0].training
    num_inputs = NUM_STEPS * training.global_batch_size // (training.micro_batch_size * data)
    for name, outcome, expected in zip(names, train_layouts(configs, data), references(names, num_layers), strict=True):
        assert_equal_numbers(outcome, expected, name)
        assert_equal_work(outcome, expected, same_micro_batches=data == parallel.get("pipeline", 1) == 1)
        assert outcome.inputs.count == num_inputs, "the chunks of a stage share a micro-batch's inputs"


@pytest.mark.parametrize("layout", slow_except(IN_EACH_RUN, LAYOUTS), ids=_name)
def test_equals_the_single_process(layout):
    """One stream and two."""
    parallel, data = layout
    _assert_all_equal_the_single_process(GRID_STREAMS, {**parallel, "sequence": parallel["tensor"] > 1}, data)


@pytest.mark.parametrize(("method", "streams"), [("all_gather", set(STREAMS) - set(GRID_STREAMS)), ("all_to_all", set(STREAMS))])
def test_context_parallel_methods(method, streams):
    """Together with tensor and sequence parallelism; heads can travel as well as keys (which do in the grid above, too)."""
    parallel = {"tensor": 2, "sequence": True, "context": 2, "context_method": method}
    _assert_all_equal_the_single_process(sorted(streams), parallel, 1)


@pytest.mark.parametrize(
    ("parallel", "data"),
    [
        ({"tensor": 2, "sequence": True, "context": 2}, 1),
        pytest.param({"tensor": 2, "sequence": True, "pipeline": 2}, 1, marks=SLOW),
        pytest.param({"context": 2, "context_method": "all_to_all"}, 2, marks=SLOW),
        pytest.param({**VIRTUAL, "context": 2}, 1, marks=SLOW),
    ],
    ids=["tp2-cp2", "tp2-pp2", "cp2-dp2", "tp2-pp2-vpp2-cp2"],
)
def test_objectives_keep_the_numbers(parallel, data):
    _assert_all_equal_the_single_process(list(OBJECTIVES), parallel, data)


@pytest.mark.slow
def test_several_heads_a_rank_travel():
    """Train with two heads a rank: with one, strides that are wrong describe the same memory."""
    cases = list(itertools.product(GRID_STREAMS, (1, 2)))
    configs = []
    for streams, micro_batch_size in cases:
        config = layout_config(streams, num_layers=2, context=2, context_method="all_to_all", distributed_optimizer=False)
        config.training.micro_batch_size = micro_batch_size
        configs.append(config)
    expected = references([streams for streams, _ in cases], num_layers=2)
    for case, outcome, wanted in zip(cases, train_layouts(configs), expected, strict=True):
        assert outcome.inputs.travels == {"heads"}
        assert_equal_numbers(outcome, wanted, str(case))


@pytest.mark.parametrize(
    ("parallel", "data"),
    [
        ({"context": 2}, 1),
        pytest.param({"context": 4}, 1, marks=SLOW),
        pytest.param({"context": 2}, 2, marks=SLOW),
        ({"context": 2, "pipeline": 2, "virtual_pipeline": 2}, 1),
        pytest.param({"context": 2, "tensor": 2, "sequence": True, "pipeline": 2}, 1, marks=SLOW),
    ],
    ids=str,
)
def test_clean_keys_alone_travel_where_blocks_stay_home(parallel, data):
    outcome = train_layout(layout_config("two-stream-aligned", data, **parallel, distributed_optimizer=False), data)
    assert outcome.inputs.travels == {"clean"}
    assert_equal_work(outcome, reference("two-stream-aligned"), same_micro_batches=data == parallel.get("pipeline", 1) == 1)
    assert_equal_numbers(outcome, reference("two-stream-aligned"))


def test_noisy_keys_travel_where_blocks_cross_chunks():
    """Blocks of 4 from unaligned document starts, chunks of 2: no chunk border is a block border."""
    outcome = train_layout(layout_config("two-stream", context=2, context_chunk_size=2, distributed_optimizer=False))
    assert outcome.inputs.travels == {"all"}
    assert_equal_work(outcome, reference("two-stream"), same_micro_batches=True)
    assert_equal_numbers(outcome, reference("two-stream"))


@pytest.mark.slow
def test_distributed_optimizer_keeps_the_numbers():
    """Shard states and masters; the timestep embedding has buckets of its own, or its stages would add different slices."""
    parallel = {"tensor": 2, "sequence": True, "pipeline": 2, "distributed_optimizer": True}
    outcomes = train_layouts([layout_config(streams, 2, **parallel) for streams in GRID_STREAMS], 2)
    for streams, outcome, expected in zip(GRID_STREAMS, outcomes, references(GRID_STREAMS), strict=True):
        assert_equal_numbers(outcome, expected, streams)


def _sequence_timesteps_config(**parallel):
    """Grouped queries, two samples a micro-batch, one t a sample."""
    config = layout_config("two-stream", **parallel)
    config.model.num_query_groups, config.training.micro_batch_size, config.diffusion.timestep_per = 2, 2, "sequence"
    return config


@pytest.fixture(scope="module")
def sequence_timesteps_reference():
    return train_layout(_sequence_timesteps_config())


@pytest.mark.parametrize(
    ("parallel", "data"),
    [
        pytest.param(VIRTUAL, 1, marks=SLOW),
        pytest.param({"context": 2}, 2, marks=SLOW),
        ({"pipeline": 2, "virtual_pipeline": 2}, 2),
    ],
    ids=str,
)
def test_defaults_keep_the_numbers(parallel, data, sequence_timesteps_reference):
    """The distributed optimizer is the default; so are, in real runs, micro-batches of several samples."""
    config = _sequence_timesteps_config(**parallel)
    assert config.parallel.distributed_optimizer
    assert_equal_numbers(train_layout(config, data), sequence_timesteps_reference)


OPTIONS = [
    {"recompute": "full"},
    {"recompute": "selective"},
    {"sequence": False},
    {"num_layers_in_first_stage": 1, "num_layers_in_last_stage": 3},
]


@pytest.mark.parametrize(
    ("context", "options"), [(1, OPTIONS[::3]), pytest.param(1, OPTIONS[1:3], marks=SLOW), pytest.param(2, OPTIONS, marks=SLOW)]
)
def test_options_keep_the_numbers(context, options):
    parallel = {"tensor": 2, "sequence": True, "pipeline": 2, "context": context, "distributed_optimizer": False}
    configs = [layout_config("two-stream", **{**parallel, **option}) for option in options]
    for option, outcome in zip(options, train_layouts(configs), strict=True):
        assert_equal_numbers(outcome, reference("two-stream"), str(option))


def test_models_keep_the_numbers():
    """A tied head has a copy of the embedding on the last stage; without conditioning there is nothing to replicate."""
    models = [{"tie_embeddings": True}, {"conditioning": "none"}, {"qkv_bias": True, "num_query_groups": 2}]
    single, parallel = (
        [layout_config("one-stream", **layout, distributed_optimizer=False) for _ in models]
        for layout in ({}, {"tensor": 2, "sequence": True, "pipeline": 2})
    )
    for configs in (single, parallel):
        for config, fields in zip(configs, models, strict=True):
            for name, value in fields.items():
                setattr(config.model, name, value)
    for fields, outcome, expected in zip(models, train_layouts(parallel), train_layouts(single), strict=True):
        assert_equal_numbers(outcome, expected, str(fields))


@pytest.mark.slow
def test_rates_by_parameter_keep_the_numbers():
    """A frozen embedding below recomputed layers, a slow MLP, a frozen layer (all of a stage's chunk); without the distributed optimizer
    and with it."""
    single, parallel = (
        [layout_config("one-stream", **layout, distributed_optimizer=sharded) for sharded in (False, True)]
        for layout in ({}, {**VIRTUAL, "recompute": "full"})
    )
    for config in (*single, *parallel):
        config.optimizer.rate_multipliers = {"embedding.*": 0.0, "decoder.layers.2.*": 0.0, "*.mlp.*": 0.1}
    expected = train_layouts(single)
    for outcome, wanted in zip(train_layouts(parallel), expected, strict=True):
        assert_equal_numbers(outcome, wanted)
    start = train_layout(layout_config("one-stream", distributed_optimizer=False), num_steps=0).parameters
    for outcome in expected:
        _assert_rates(outcome.parameters, start)


def _assert_rates(parameters, start):
    """Compare how far each parameter moved with how far it moves at the full rate."""
    trained = reference("one-stream").parameters
    for name, parameter in parameters.items():
        moved = (parameter - start[name]).norm() / (trained[name] - start[name]).norm()
        if name.startswith(("embedding.", "decoder.layers.2.")):
            assert moved == 0, name
        else:
            assert moved == pytest.approx(0.1 if ".mlp." in name else 1.0, rel=0.3), name


def test_bf16_is_near():
    """Not exact: bf16 rounds partial sums differently. Nor far: the layouts share weights and noise."""
    losses = []
    for parallel in ({}, {"tensor": 2, "sequence": True, "pipeline": 2}):
        config = layout_config("two-stream", **parallel)
        config.training.precision = "bf16"
        losses.append(train_layout(config).losses)
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2}, pytest.param(VIRTUAL, marks=SLOW)],
    ids=str,
)
def test_loss_in_chunks_keeps_the_numbers(parallel):
    """Chunks of five positions, the last of them shorter; next tokens of the clean stream among them."""
    configs = [layout_config(name, **parallel, distributed_optimizer=False) for name in ("one-stream", "joint")]
    for config in configs:
        config.training.loss_chunk_size = 5
    for config, outcome, name in zip(configs, train_layouts(configs), ("one-stream", "joint"), strict=True):
        assert config.training.loss_chunk_size < outcome.work[0].num_logits / 8
        assert_equal_numbers(outcome, reference(name), name)


@pytest.mark.slow
def test_loss_in_chunks_of_a_tied_head():
    """One weight with two gradients, that of the head straight in the fp32 buffer and that of the embedding through autograd."""
    configs = [layout_config("one-stream", distributed_optimizer=False)]
    configs.append(layout_config("one-stream", tensor=2, sequence=True, distributed_optimizer=False))
    configs[1].training.loss_chunk_size = 5
    for config in configs:
        config.model.tie_embeddings = True
    assert_equal_numbers(train_layout(configs[1]), train_layout(configs[0]))


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"distributed_optimizer": False, "overlap_grad_reduce": True}, marks=SLOW),
        {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
        pytest.param({"overlap_grad_reduce": True, "overlap_param_gather": True, **VIRTUAL}, marks=SLOW),
    ],
    ids=str,
)
def test_overlap_keeps_the_numbers(parallel, monkeypatch):
    """Buckets of a few parameters each, in flight during backward and forward passes; the head's weight is gathered for its chunks too."""
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE", 4000)
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE_PER_RANK", 1)
    config = layout_config("two-stream", **parallel)
    config.training.loss_chunk_size = 5
    assert_equal_numbers(train_layout(config, 2), reference("two-stream"))
