"""The layouts that --search finds, and how predictions depend on the layout."""

import dataclasses
import io

import pytest
from rich.console import Console

from w1train.config.compose import load_config
from w1train.config.rules.validate import validate
from w1train.planning.assumptions import DEVICES, Assumptions, replace_assumptions
from w1train.planning.expert_timing import tile_factor
from w1train.planning.plan_prediction import RECOMPUTE_CHOICES, Plan, predict
from w1train.planning.search import _candidate, _layouts, _micro_batches, search_layouts
from w1train.planning.search_progress import FIRST_SECONDS, with_progress

H100 = DEVICES["h100"]


@pytest.fixture(scope="module")
def w1():
    return load_config(["recipe=w1_4b"])


@pytest.fixture(scope="module")
def found():
    return search_layouts(load_config(["recipe=llada_8b", "training.global_batch_size=16"]), 16, H100, Assumptions())


def test_only_valid_layouts_that_fit_fastest_first(found):
    assert found.plans
    for plan in found.plans:
        assert validate(plan.config, 16) == []
        assert plan.fits
        assert plan.layout.world_size == plan.layout.tensor * plan.layout.context * plan.layout.pipeline * plan.layout.data
        assert plan.layout.num_micro_batches * plan.layout.micro_batch_size * plan.layout.data == 16
    speeds = [plan.mfu for plan in found.plans]
    assert speeds == sorted(speeds, reverse=True)
    assert found.num_tried > found.num_valid > len(found.plans)


def test_every_kind_of_layout_is_tried(found):
    """8B does not fit on 16 devices with data parallelism alone, and layouts of every kind make it fit."""
    layouts = [plan.layout for plan in found.plans]
    assert {layout.tensor for layout in layouts} >= {2, 4, 8}
    assert {layout.pipeline for layout in layouts} >= {1, 2, 4}
    assert {layout.recompute for layout in layouts} == {"none", "selective", "full"}
    assert {layout.virtual_pipeline for layout in layouts} >= {1, 2}
    assert {layout.context for layout in layouts} >= {1, 2}
    assert {layout.sequence for layout in layouts} == {False, True}


def _search_slowly(config, world_size, device, assumptions) -> list[Plan]:
    """Plan every layout on its own, whether or not it can fit."""
    plans = []
    for parallel in _layouts(config, world_size, device.devices_per_node):
        for micro_batch in _micro_batches(config, parallel, world_size):
            candidates = [_candidate(config, parallel, micro_batch, recompute) for recompute in RECOMPUTE_CHOICES]
            if validate(candidates[0], world_size):
                continue
            fitting = [plan for each in candidates if (plan := predict(each, world_size, device, assumptions)).fits]
            plans += fitting
            if not fitting:
                break
    return sorted(plans, key=lambda plan: -plan.mfu)


@pytest.mark.parametrize(("recipe", "world_size"), [("demo_moe", 4), ("demo", 2)])
def test_what_layouts_share_changes_no_plan(recipe, world_size):
    sizes = ["model.num_layers=2", "training.global_batch_size=2", "training.micro_batch_size=1", "diffusion.num_strata=2"]
    config = load_config([f"recipe={recipe}", *sizes, *(["optimizer=muon"] if recipe == "demo" else [])])
    small = dataclasses.replace(Assumptions(), reserved_gib=0)
    device = dataclasses.replace(H100, devices_per_node=2)
    needed = sorted(plan.needed_bytes for plan in search_layouts(config, world_size, device, small).plans)
    device = dataclasses.replace(device, memory_bytes=needed[len(needed) // 2])
    expected = _search_slowly(config, world_size, device, small)
    found = search_layouts(config, world_size, device, small)
    assert found.plans == expected
    assert 0 < len(expected) < found.num_valid, "some layouts do not fit"


def test_recomputed_experts_hinder_no_recomputation():
    config = load_config(["recipe=llada2_mini", "parallel.recompute=selective", "parallel.recompute_experts=true"])
    candidates = [_candidate(config, config.parallel, 1, recompute) for recompute in RECOMPUTE_CHOICES]
    assert [validate(candidate, 64) for candidate in candidates] == [[], [], []]
    assert [candidate.parallel.recompute_experts for candidate in candidates] == [False, True, False]


class Clock:
    """A clock on which each layout takes some seconds."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, -seconds

    def __call__(self):
        self.now += self.seconds
        return self.now


def test_a_long_search_shows_its_rate_and_the_time_left():
    output = io.StringIO()
    assert list(with_progress(range(50), Console(file=output, width=120), Clock(0.5))) == list(range(50))
    lines = output.getvalue().splitlines()
    assert lines == [
        "search: 5 of 50 layouts, 1.7 layouts/s, 0:27 left",
        "search: 25 of 50 layouts, 1.9 layouts/s, 0:13 left",
        "search: 45 of 50 layouts, 2.0 layouts/s, 0:03 left",
    ]


def test_a_short_search_shows_nothing():
    output = io.StringIO()
    assert list(with_progress("abc", Console(file=output), Clock(FIRST_SECONDS / 4))) == ["a", "b", "c"]
    assert output.getvalue() == ""


def test_a_terminal_shows_a_bar():
    output = io.StringIO()
    assert list(with_progress("abc", Console(file=output, force_terminal=True, width=120), Clock(2.0))) == ["a", "b", "c"]
    assert "layouts/s" in output.getvalue()


def test_search_leaves_the_recipe_alone(w1):
    before = dataclasses.asdict(w1)
    search_layouts(w1, 2, H100, Assumptions())
    assert dataclasses.asdict(w1) == before


def test_a_layout_that_does_not_fit(w1):
    config = dataclasses.replace(w1, training=dataclasses.replace(w1.training, micro_batch_size=64))
    plan = predict(config, 8, H100, Assumptions())
    assert not plan.fits
    assert plan.needed_bytes > H100.memory_bytes
    assert predict(config, 8, dataclasses.replace(H100, memory_bytes=plan.needed_bytes), Assumptions()).fits


def test_more_efficient_devices_are_faster_and_more_memory_changes_no_speed(w1):
    plan = predict(w1, 512, H100, Assumptions())
    better, problems = replace_assumptions(Assumptions(), ["matmul_efficiency=0.9"])
    assert problems == []
    assert predict(w1, 512, H100, better).mfu > plan.mfu
    assert predict(w1, 512, DEVICES["h200"], Assumptions()).mfu > plan.mfu  # faster memory
    assert predict(w1, 512, dataclasses.replace(H100, memory_bytes=10**12), Assumptions()).step_seconds == plan.step_seconds


def test_less_nvlink_slows_tensor_parallelism_down_only(w1):
    tensor = dataclasses.replace(w1, parallel=dataclasses.replace(w1.parallel, tensor=4, sequence=True))
    stages = [predict(tensor, 512, DEVICES[name], Assumptions()).stages[0].seconds for name in ("h100", "h800")]
    assert stages[1].tensor_parallel > 1.5 * stages[0].tensor_parallel
    assert stages[1].matmul == stages[0].matmul


def test_packed_documents_need_fewer_model_flops_but_not_less_time(w1):
    """With a dense mask every pair is computed, so packing lowers MFU unless a kernel skips masked pairs."""
    whole, packed = (predict(w1, 512, H100, Assumptions(), documents) for documents in (None, 512))
    assert packed.work.visible_pairs == 8 * 512**2
    assert packed.flops_per_token["attention_core"] == whole.flops_per_token["attention_core"] / 8
    assert packed.step_seconds > whole.step_seconds
    assert packed.mfu < whole.mfu


def test_context_parallel_ranks_exchange_clean_keys_only_where_blocks_stay_home(w1):
    def sent(**diffusion):
        config = dataclasses.replace(
            w1,
            parallel=dataclasses.replace(w1.parallel, context=4),
            diffusion=dataclasses.replace(w1.diffusion, block_size=32, **diffusion),
        )
        traffic = predict(config, 512, H100, Assumptions(), document_length=1000).stages[0].traffic
        return next(item.sent_bytes for item in traffic if item.name == "keys and values")

    assert sent(block_index="document") == 2 * sent(block_index="sample")


def test_days_follow_the_batch_sizes_and_objectives_of_the_schedule(w1):
    plan = predict(w1, 64, H100, Assumptions())
    small = predict(_with_stages(w1, global_batch_size=64), 64, H100, Assumptions())
    assert small.tokens_per_step == plan.tokens_per_step / 8
    assert small.days == pytest.approx(plan.days * plan.tokens_per_second / small.tokens_per_second)
    blocks = predict(_with_stages(w1, "stable", diffusion={"block_size": 32}), 64, H100, Assumptions())
    assert blocks.work.num_streams == 2, "the stage that needs most is planned"
    assert blocks.days_of("warmup") == plan.days_of("warmup")
    assert blocks.days == pytest.approx(plan.days + blocks.days_of("stable") - plan.days_of("stable"))
    assert blocks.days_of("stable") > 1.7 * plan.days_of("stable")


def _with_stages(config, *names, **changes):
    stages = {
        name: dataclasses.replace(stage, **changes) if name in names or not names else stage
        for name, stage in config.schedule.stages.items()
    }
    return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, stages=stages))


def _flash(**changes):
    config = load_config(["recipe=llada2_flash"])
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **changes))


def test_experts_of_a_token_are_cheapest_inside_a_node():
    """Over 64 ranks most rows pass the network, at a ninth of NVLink's bandwidth."""
    seconds = {size: predict(_flash(expert=size), 512, H100, Assumptions()).stages[1].seconds.expert_parallel for size in (4, 8, 16, 64)}
    assert seconds[4] < seconds[8] < 0.5 * seconds[16] < 0.5 * seconds[64]


def test_rows_of_experts_have_the_published_bytes():
    """k (8 h + 8) (EP - 1) / EP bytes of a token and layer, forward and backward: 131 kB in LLaDA2.0-mini."""
    config = load_config(["recipe=llada2_mini", "parallel.recompute=none"])
    plan = predict(config, 64, H100, Assumptions())
    sent = sum(item.sent_bytes for item in plan.stages[0].traffic if item.group == "expert")
    tokens = plan.layout.num_micro_batches * plan.layout.micro_batch_size * plan.work.num_positions
    assert sent / (19 * tokens) == 8 * (8 * 2048 + 8) * 7 / 8 == 131_136 * 7 / 8
    repeated = predict(load_config(["recipe=llada2_mini"]), 64, H100, Assumptions())
    assert sum(item.sent_bytes for item in repeated.stages[0].traffic if item.group == "expert") == 1.5 * sent


def test_uneven_experts_cost_time_and_memory_but_no_flops():
    even, uneven = (predict(_flash(), 512, H100, replace_assumptions(Assumptions(), [f"expert_imbalance={ratio}"])[0]) for ratio in (1, 2))
    assert even.flops_per_token == uneven.flops_per_token
    parts = [(plan.stages[0].seconds.matmul, plan.stages[0].seconds.expert_parallel, plan.needed_bytes) for plan in (even, uneven)]
    assert all(more > less for less, more in zip(*parts, strict=True))
    alone = [predict(_flash(expert=1), 512, H100, replace_assumptions(Assumptions(), [f"expert_imbalance={ratio}"])[0]) for ratio in (1, 2)]
    assert alone[0].step_seconds == alone[1].step_seconds, "a rank that has all experts computes all rows"


def test_memory_of_experts_is_that_of_the_closed_form():
    """Routed experts take (6 + 12 / EDP) bytes a parameter, in bf16 with the distributed optimizer; padding is below a percent."""
    plan = predict(load_config(["recipe=llada2_mini"]), 64, H100, Assumptions())
    routed = 19 * 256 * 3 * 2048 * 512
    assert plan.layout.expert_data == 8
    assert plan.stages[0].expert_state.total == pytest.approx(routed / 8 * (6 + 12 / 8), rel=0.01)
    others = plan.stages[0].state.total - plan.stages[0].expert_state.total
    assert others == pytest.approx((16_255_638_528 - routed) * (6 + 12 / 64), rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "num_gpus", "changes", "gigabytes"),
    [
        ("llada2_mini", 8, ["parallel.expert=8"], 41.6),
        ("llada2_mini", 64, ["parallel.expert=8"], 20.3),
        ("llada2_flash", 256, ["parallel.expert=32", "parallel.pipeline=1"], 41.7),
    ],
)
def test_memory_of_weights_and_optimizer_is_the_known_one(recipe, num_gpus, changes, gigabytes):
    plan = predict(load_config([f"recipe={recipe}", *changes]), num_gpus, H100, Assumptions())
    assert plan.stages[0].state.total / 1e9 == pytest.approx(gigabytes, abs=0.15)


def test_tiles_of_few_rows_are_mostly_empty():
    """An expert has one tile of 64 rows at least; with thousands of rows half a tile is little."""
    sizes = predict(load_config(["recipe=llada2_mini"]), 64, H100, Assumptions())._setting.sizes().experts
    few = {rows: tile_factor(dataclasses.replace(sizes, rows=rows * sizes.num_local)) for rows in (16, 32, 64, 128, 256, 4096)}
    assert few == {16: 4, 32: 2, 64: 1.5, 128: 1.25, 256: 1.25, 4096: 1 + 64 / 4096}


def test_a_rank_with_all_experts_and_few_rows_reads_their_matrices():
    """With 8 context-parallel ranks each of 256 experts has 32 rows of a micro-batch. The 1.6 GB of a layer's matrices take longer than the
    products, and as long with half of the rows."""
    seconds = {}
    for context in (4, 8):
        words = [f"parallel.context={context}", "parallel.expert=1", "parallel.pipeline=4", "parallel.recompute=none"]
        plan = predict(load_config(["recipe=llada2_mini", *words]), 64, H100, Assumptions())
        assert plan.rows_per_expert == 8192 * 8 / 256 / context
        seconds[context] = plan.stages[1].seconds.matmul / plan.layout.num_micro_batches
        whole = 256 * 3 * 2048 * 512 * 2
        assert seconds[context] > 5 * 3 * whole / (3350e9 * 0.8)
    assert seconds[4] < 1.2 * seconds[8]


@pytest.mark.parametrize(
    ("recipe", "num_gpus"),
    [("llada2_mini", 64), ("llada2_flash", 64), ("llada2_flash", 512), ("llada_moe_7b", 64), ("rnd1_30b", 64), ("sdar_30b", 64)],
)
def test_recipes_of_experts_fit_as_they_are(recipe, num_gpus):
    config = load_config([f"recipe={recipe}"])
    assert validate(config, num_gpus) == []
    assert predict(config, num_gpus, H100, Assumptions()).fits


@pytest.mark.slow
def test_the_search_tries_expert_parallelism_and_suggests_it_inside_a_node():
    config = load_config(["recipe=rnd1_30b", "training.global_batch_size=16"])
    found = search_layouts(config, 16, H100, Assumptions())
    layouts = [plan.layout for plan in found.plans]
    assert {layout.expert for layout in layouts} >= {2, 4, 8, 16}
    assert {layout.expert_tensor for layout in layouts} >= {1, 2}
    assert all(layout.sequence or layout.tensor == 1 for layout in layouts)
    assert 1 < layouts[0].num_expert_slices <= H100.devices_per_node
