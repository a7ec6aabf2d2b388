"""The plan as tables on the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from w1train.model.flops import num_active_parameters, num_parameters
from w1train.objectives.description import describe_objective
from w1train.planning.as_json import overrides
from w1train.planning.assumptions import described
from w1train.planning.communication_time import seconds
from w1train.planning.parameters import num_trained_parameters
from w1train.planning.plan_prediction import Plan, StagePlan
from w1train.planning.search import SearchResult
from w1train.planning.state import StateBytes, staging_bytes
from w1train.planning.suggestion import num_nodes_of_experts, suggest_expert_parallelism, suggest_recomputation
from w1train.runtime.quantities import quantity

if TYPE_CHECKING:  # at run time it would import torch
    from w1train.planning.meta_build import Build

GIB = 2**30


def print_plan(console: Console, plan: Plan, build: Build) -> None:
    """Print the whole plan, with the verdict at the end."""
    layout = plan.layout
    console.print(
        f"{plan.config.name}: {_parameters_text(plan)} on {layout.world_size} x {plan.device.name}: "
        f"data {layout.data} x context {layout.context} x tensor {layout.tensor} x pipeline {layout.pipeline}"
        f"{f' ({layout.virtual_pipeline} chunks each)' if layout.virtual_pipeline > 1 else ''}, "
        f"sequence parallelism {'on' if layout.sequence else 'off'}, {_experts_text(plan)}recompute {layout.recompute}, "
        f"{layout.num_micro_batches} x {layout.micro_batch_size} samples of a data-parallel rank a step"
    )
    for table in (memory_table(plan), work_table(plan), traffic_table(plan), speed_table(plan), *schedule_tables(plan)):
        console.print()
        console.print(table)
    console.print("\nassumed: " + ", ".join(f"{name} {value:g}" for name, value in described(plan.assumptions).items()))
    console.print("(sources: w1train/planning/assumptions.py; replace one with --assume NAME=VALUE)")
    console.print("\n" + build_text(build))
    console.print(verdict(plan))
    console.print(suggestion(plan))
    if plan.config.model.experts.num_experts:
        console.print(expert_suggestion(plan))


def _parameters_text(plan: Plan) -> str:
    model, adapters = plan.config.model, plan.config.adapters
    total, active = num_parameters(model, adapters), num_active_parameters(model, adapters)
    trained = f", of which {num_trained_parameters(model, adapters):,} are trained," if adapters.rank else ""
    return f"{total:,} parameters" + (f", of which {active:,} compute a token," if active < total else "") + trained


def build_text(build: Build) -> str:
    """Say which ranks were built and which were not."""
    if build.num_built == build.num_ranks:
        what = f"built all {build.num_ranks} ranks on meta tensors"
    else:
        what = (
            f"built {build.num_built} of {build.num_ranks} ranks on meta tensors, one for each tensor and pipeline coordinate (the others "
            "build the same; the groups of all ranks were checked against megatron-core's)"
        )
    return f"{what} in {build.seconds:.1f} s: {build.num_parameters:,} parameters, each counted once"


def verdict(plan: Plan) -> str:
    """Say whether the plan fits on the device that needs most memory."""
    needed, there = plan.needed_bytes / GIB, plan.device.memory_bytes / GIB
    if plan.fits:
        return f"fits: the fullest device needs {needed:.1f} of {there:.1f} GiB"
    return (
        f"DOES NOT FIT: the fullest device needs {needed:.1f} GiB and has {there:.1f}. These need less memory: a smaller "
        "training.micro_batch_size, parallel.recompute=full, parallel.tensor with parallel.sequence, parallel.pipeline; --search tries all"
    )


def suggestion(plan: Plan) -> str:
    """Say which is the cheapest recomputation that fits."""
    cheapest = suggest_recomputation(plan)
    if cheapest is None:
        return "no recomputation makes this layout fit"
    layout = cheapest.layout
    groups = f" parallel.recompute_num_layers={layout.recompute_num_layers}" if layout.recompute == "full" else ""
    same = layout.recompute == plan.layout.recompute
    return f"cheapest recomputation that fits: parallel.recompute={layout.recompute}{groups} ({_compared(plan, cheapest, same=same)})"


def expert_suggestion(plan: Plan) -> str:
    """Say which expert parallelism is the fastest inside a node, where NVLink carries the rows of tokens."""
    num_nodes = num_nodes_of_experts(plan)
    spread = "" if num_nodes == 1 else f"the rows of experts cross the network, because their ranks are on {num_nodes} nodes; "
    fastest = suggest_expert_parallelism(plan)
    if fastest is None:
        return f"{spread}no expert parallelism inside a node fits here: parallel.pipeline also divides the experts, between nodes"
    expert, same = fastest.layout.expert, fastest.layout.expert == plan.layout.expert
    return f"{spread}fastest expert parallelism inside a node that fits: parallel.expert={expert} ({_compared(plan, fastest, same=same)})"


def _compared(plan: Plan, other: Plan, *, same: bool) -> str:
    """Return the memory and the speed of a suggestion in words."""
    gain = plan.step_seconds / other.step_seconds - 1
    speed = "as planned" if same else f"{abs(gain):.1%} {'faster' if gain >= 0 else 'slower'} than as planned"
    return f"{other.needed_bytes / GIB:.1f} of {plan.device.memory_bytes / GIB:.1f} GiB; {speed}"


def memory_table(plan: Plan) -> Table:
    """Return the table of memory of the pipeline stages that need most and least memory."""
    stages = _extremes(plan)
    table = Table(title="memory of a device, GiB", title_justify="left")
    table.add_column()
    for stage in stages:
        table.add_column(_stage_title(plan, stage), justify="right")

    def row(name: str, values: list[float]) -> None:
        table.add_row(name, *(f"{value / GIB:.2f}" for value in values))

    def state_row(name: str, part: Callable[[StateBytes], int]) -> None:
        row(name, [part(stage.state) for stage in stages])
        if plan.config.model.experts.num_experts:
            row("   of routed experts", [part(stage.expert_state) for stage in stages])

    state_row(f"parameters ({plan.config.training.precision})", lambda state: state.parameters)
    state_row("gradients (fp32)", lambda state: state.gradients)
    state_row("optimizer (fp32 masters and moments)", lambda state: state.optimizer)
    if any(stage.reference_bytes for stage in stages):
        row(f"frozen reference ({plan.config.training.precision})", [stage.reference_bytes for stage in stages])
    table.add_row("micro-batches in flight, by chunk", *(", ".join(map(str, stage.in_flight)) for stage in stages))
    row("activations", [stage.activation_bytes for stage in stages])
    by_recompute = [plan.activations_by_recompute(stage) for stage in stages]
    for choice in by_recompute[0]:
        row(f"   if recompute={choice}", [choices[choice] for choices in by_recompute])
    row("working memory", [stage.working_bytes for stage in stages])
    reserved = plan.assumptions.reserved_gib * GIB
    row("reserved (assumed)", [reserved for _ in stages])
    table.add_section()
    row("total", [stage.total_bytes + reserved for stage in stages])
    row("device", [plan.device.memory_bytes for _ in stages])
    if plan.config.checkpoint.asynchronous:
        table.add_section()
        row("host memory, for checkpoints in the background", [_staging_bytes(plan, stage) for stage in stages])
    return table


def _staging_bytes(plan: Plan, stage: StagePlan) -> float:
    layout, precision = plan.layout, plan.config.training.precision
    parts = ((stage.state - stage.expert_state, layout.num_optimizer_shards), (stage.expert_state, layout.expert_data))
    return sum(staging_bytes(state, precision, shards, distributed=layout.distributed_optimizer) for state, shards in parts)


def _experts_text(plan: Plan) -> str:
    layout, experts = plan.layout, plan.config.model.experts
    if not experts.num_experts:
        return ""
    return (
        f"experts {experts.num_experts} over {layout.expert} expert-parallel x {layout.expert_tensor} expert-tensor-parallel ranks "
        f"({layout.expert_data} copies, {layout.expert_dispatcher.replace('_', '-')}; {plan.rows_per_expert:,.0f} rows of a micro-batch "
        "for each expert), "
    )


def work_table(plan: Plan) -> Table:
    """Return the table of FLOPs of a token by part."""
    work = plan.work
    title = (
        f"model FLOPs per token ({work.num_documents} document{'s' if work.num_documents > 1 else ''} a sample: "
        f"{work.visible_pairs:,} visible pairs, {work.visible_share:.1%} of all; {work.num_logits:,.0f} logits of {work.num_tokens} tokens)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("FLOPs", justify="right")
    table.add_column("share", justify="right")
    total = plan.flops_per_token["total"]
    for name, flops in plan.flops_per_token.items():
        if flops == 0:
            continue  # a part that the model does not have
        table.add_row(name.replace("_", " "), quantity(flops), f"{flops / total:.1%}")
    return table


def traffic_table(plan: Plan) -> Table:
    """Return the table of a step's collectives on the slowest pipeline rank."""
    stage = _slowest(plan)
    table = Table(title=f"collectives of a step, out of a rank of {_stage_title(plan, stage)}", title_justify="left")
    for column in ("what", "collective", "ranks"):
        table.add_column(column)
    for column in ("calls", "MB a call", "GB sent", "ms"):
        table.add_column(column, justify="right")
    for item in stage.traffic:
        spent = seconds(item, plan.layout, plan.device, plan.assumptions)
        table.add_row(
            item.name,
            item.collective.replace("_", "-"),
            f"{item.group_size} ({item.group})",
            f"{item.num_calls:,}",
            f"{item.tensor_bytes / item.num_calls / 1e6:,.1f}",
            f"{item.sent_bytes / 1e9:.2f}",
            f"{spent * 1e3:.1f}",
        )
    if not stage.traffic:
        table.add_row("none", "", "", "", "", "", "")
    return table


def speed_table(plan: Plan) -> Table:
    """Return the table of a step's time by part on the slowest pipeline rank, and of the resulting speed."""
    stage = _slowest(plan)
    table = Table(title="speed, predicted", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, label in (
        ("matmul", "linear layers"),
        ("attention", "attention"),
        ("elementwise", "element-wise kernels"),
        ("tensor_parallel", "tensor-parallel collectives"),
        ("context_parallel", "context-parallel collectives"),
        ("expert_parallel", "tokens to experts and back"),
        ("pipeline_sends", "pipeline sends"),
        ("gradients_and_optimizer", "gradient and optimizer passes"),
        ("data_parallel", "collectives once a step"),
    ):
        table.add_row(label, f"{getattr(stage.seconds, name) * 1e3:,.1f} ms")
    table.add_row("pipeline bubble", f"{plan.bubble_fraction:.1%}")
    table.add_section()
    table.add_row("step", f"{plan.step_seconds:.3f} s for {plan.tokens_per_step:,} tokens")
    table.add_row("speed", f"{quantity(plan.tokens_per_second)} tokens/s, {plan.tflops_per_device:.0f} TFLOP/s a device")
    table.add_row("MFU", f"{plan.mfu:.1%} of {plan.device.peak_tflops:g} TFLOP/s")
    table.add_row("the whole schedule", f"{plan.days:.1f} days")
    return table


def schedule_tables(plan: Plan) -> Iterator[Table]:
    """Yield the table of the schedule's stages if they differ."""
    stages = {name: plan.at_stage(name) for name in plan.run.schedule.stages}
    if all(stage is plan for stage in stages.values()):
        return
    table = Table(title=f"stages of the schedule; above: {describe_objective(plan.config)}, which needs most memory", title_justify="left")
    for column in ("stage", "objective"):
        table.add_column(column)
    for column in ("tokens", "batch", "GiB", "tokens/s", "MFU", "days"):
        table.add_column(column, justify="right")
    for name, stage in stages.items():
        table.add_row(
            *(name, describe_objective(stage.config), quantity(plan.run.schedule.stages[name].tokens)),
            *(str(stage.config.training.global_batch_size), f"{stage.needed_bytes / GIB:.1f}", quantity(stage.tokens_per_second)),
            *(f"{stage.mfu:.1%}", f"{plan.days_of(name):.1f}"),
        )
    yield table


def print_search(console: Console, result: SearchResult, num_shown: int, num_gpus: int) -> None:
    """Print the best layouts."""
    table = Table(title=f"best layouts of {num_gpus} devices by predicted MFU", title_justify="left")
    columns = "# DP CP TP SP PP VP EP ETP batch count recompute GiB bubble seconds MFU days"
    for column in columns.split():
        table.add_column(column, justify="left" if column == "recompute" else "right")
    for number, plan in enumerate(result.plans[:num_shown], 1):
        table.add_row(*_search_row(number, plan))
    console.print(table)
    console.print("DP, CP, TP, PP: data-, context-, tensor- and pipeline-parallel ranks; SP: sequence parallelism; VP: chunks of a stage;")
    console.print("EP, ETP: expert-parallel ranks, and tensor-parallel ranks of each expert, both taken from the ranks of a stage;")
    console.print("batch: samples of a micro-batch; count: micro-batches of a rank in a step")
    console.print(f"{result.num_tried} layouts tried, {result.num_valid} valid, {len(result.plans)} fit; plan one of them to build it")
    if result.plans:
        console.print("the first: " + " ".join(overrides(result.plans[0])))
    else:
        console.print("NO LAYOUT FITS: use more devices, or a device with more memory")


def _search_row(number: int, plan: Plan) -> Iterator[str]:
    layout = plan.layout
    yield from map(str, (number, layout.data, layout.context, layout.tensor))
    yield from map(str, ("on" if layout.sequence else "off", layout.pipeline, layout.virtual_pipeline))
    yield from map(str, (layout.expert, layout.expert_tensor))
    yield from (str(layout.micro_batch_size), str(layout.num_micro_batches), layout.recompute, f"{plan.needed_bytes / GIB:.1f}")
    yield from (f"{plan.bubble_fraction:.1%}", f"{plan.step_seconds:.3f}", f"{plan.mfu:.1%}", f"{plan.days:.1f}")


def _extremes(plan: Plan) -> list[StagePlan]:
    """Return the stages that need most and least memory; one stage if both need the same."""
    fullest = max(plan.stages, key=lambda stage: stage.total_bytes)
    emptiest = min(plan.stages, key=lambda stage: stage.total_bytes)
    return [fullest] if fullest.total_bytes == emptiest.total_bytes else [fullest, emptiest]


def _slowest(plan: Plan) -> StagePlan:
    return max(plan.stages, key=lambda stage: stage.seconds.per_micro_batches)


def _stage_title(plan: Plan, stage: StagePlan) -> str:
    return "every rank" if len(plan.stages) == 1 else f"stage {stage.pipeline_rank} of {len(plan.stages)}"
