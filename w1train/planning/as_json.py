"""The plan as plain data. Keys end in their units: _bytes, _seconds, _per_token; keys of fractions and counts have no unit."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from w1train.model.flops import num_active_parameters, num_parameters
from w1train.objectives.description import describe_objective
from w1train.planning.assumptions import described
from w1train.planning.communication_time import seconds
from w1train.planning.parameters import num_trained_parameters
from w1train.planning.plan_prediction import Plan, StagePlan
from w1train.planning.search import SearchResult
from w1train.planning.suggestion import suggest_expert_parallelism, suggest_recomputation

if TYPE_CHECKING:  # at run time it would import torch
    from w1train.planning.meta_build import Build

FORMAT_VERSION = 1


def plan_as_dict(plan: Plan, build: Build) -> dict[str, Any]:
    """Return a planned and built layout as plain data."""
    return {
        "format_version": FORMAT_VERSION,
        "name": plan.config.name,
        "num_parameters": num_parameters(plan.config.model, plan.config.adapters),
        "num_active_parameters": num_active_parameters(plan.config.model, plan.config.adapters),
        "num_trained_parameters": num_trained_parameters(plan.config.model, plan.config.adapters),
        "layout": asdict(plan.layout),
        "build": asdict(build),
        "work": {
            "num_tokens": plan.work.num_tokens,
            "num_streams": plan.work.num_streams,
            "num_positions": plan.work.num_positions,
            "num_documents": plan.work.num_documents,
            "visible_pairs": plan.work.visible_pairs,
            "visible_share": plan.work.visible_share,
            "num_logits": plan.work.num_logits,
            "num_segments": plan.work.num_segments,
        },
        "flops_per_token": plan.flops_per_token,
        "memory": {
            "device_bytes": plan.device.memory_bytes,
            "needed_bytes": plan.needed_bytes,
            "fits": plan.fits,
        },
        "suggested_recompute": _suggestion(plan),
        "suggested_expert": _expert_suggestion(plan),
        "stages": [_stage(plan, stage) for stage in plan.stages],
        "speed": speed_as_dict(plan),
        "schedule": [_stage_of_schedule(plan, name) for name in plan.run.schedule.stages],
        "device": asdict(plan.device),
        "assumptions": described(plan.assumptions),
    }


def _suggestion(plan: Plan) -> dict[str, Any] | None:
    """Return the cheapest recomputation that fits; None if no recomputation fits."""
    cheapest = suggest_recomputation(plan)
    if cheapest is None:
        return None
    return {
        "recompute": cheapest.layout.recompute,
        "recompute_num_layers": cheapest.layout.recompute_num_layers if cheapest.layout.recompute == "full" else None,
        "needed_bytes": cheapest.needed_bytes,
        "step_seconds": cheapest.step_seconds,
    }


def _expert_suggestion(plan: Plan) -> dict[str, Any] | None:
    """Return the fastest expert parallelism inside a node; None if no such layout fits, and for a dense model."""
    fastest = suggest_expert_parallelism(plan) if plan.config.model.experts.num_experts else None
    if fastest is None:
        return None
    return {"expert": fastest.layout.expert, "needed_bytes": fastest.needed_bytes, "step_seconds": fastest.step_seconds}


def _stage_of_schedule(plan: Plan, name: str) -> dict[str, Any]:
    stage = plan.at_stage(name)
    return {
        "name": name,
        "objective": describe_objective(stage.config),
        "tokens": plan.run.schedule.stages[name].tokens,
        "global_batch_size": stage.config.training.global_batch_size,
        "needed_bytes": stage.needed_bytes,
        "mfu": stage.mfu,
        "days": plan.days_of(name),
    }


def speed_as_dict(plan: Plan) -> dict[str, float]:
    """Return the predicted speed under the plan's assumptions."""
    return {
        "step_seconds": plan.step_seconds,
        "bubble_fraction": plan.bubble_fraction,
        "tokens_per_step": plan.tokens_per_step,
        "tokens_per_second": plan.tokens_per_second,
        "tflops_per_device": plan.tflops_per_device,
        "mfu": plan.mfu,
        "days": plan.days,
    }


def search_as_dict(result: SearchResult, num_shown: int) -> dict[str, Any]:
    """Return the best layouts, the fastest first."""
    return {
        "format_version": FORMAT_VERSION,
        "num_tried": result.num_tried,
        "num_valid": result.num_valid,
        "num_fitting": len(result.plans),
        "layouts": [
            {
                "layout": asdict(plan.layout),
                "overrides": overrides(plan),
                "needed_bytes": plan.needed_bytes,
                "speed": speed_as_dict(plan),
            }
            for plan in result.plans[:num_shown]
        ],
    }


def overrides(plan: Plan) -> list[str]:
    """Return the overrides that give this layout on a command line."""
    layout, has_experts = plan.layout, plan.config.model.experts.num_experts > 0
    words = [
        f"parallel.tensor={layout.tensor}",
        f"parallel.sequence={str(layout.sequence).lower()}",
        f"parallel.pipeline={layout.pipeline}",
        f"parallel.virtual_pipeline={layout.virtual_pipeline}",
        f"parallel.context={layout.context}",
        *([f"parallel.expert={layout.expert}", f"parallel.expert_tensor={layout.expert_tensor}"] if has_experts else []),
        f"parallel.recompute={layout.recompute}",
        *(["parallel.recompute_experts=true"] if layout.recompute_experts else []),
        f"training.micro_batch_size={layout.micro_batch_size}",
    ]
    return words + ([f"parallel.recompute_num_layers={layout.recompute_num_layers}"] if layout.recompute == "full" else [])


def _stage(plan: Plan, stage: StagePlan) -> dict[str, Any]:
    return {
        "pipeline_rank": stage.pipeline_rank,
        "chunks": [asdict(chunk) for chunk in stage.chunks],
        "num_parameters": stage.num_parameters,
        "parameter_bytes": stage.state.parameters,
        "gradient_bytes": stage.state.gradients,
        "optimizer_bytes": stage.state.optimizer,
        "expert_parameter_bytes": stage.expert_state.parameters,
        "expert_gradient_bytes": stage.expert_state.gradients,
        "expert_optimizer_bytes": stage.expert_state.optimizer,
        "in_flight": stage.in_flight,
        "activation_bytes": stage.activation_bytes,
        "activation_bytes_by_recompute": plan.activations_by_recompute(stage),
        "micro_batch_activation_bytes": [asdict(chunk) for chunk in stage.activations],
        "working_bytes": stage.working_bytes,
        "reference_bytes": stage.reference_bytes,
        "total_bytes": stage.total_bytes,
        "traffic": [
            {**asdict(item), "sent_bytes": item.sent_bytes, "seconds": seconds(item, plan.layout, plan.device, plan.assumptions)}
            for item in stage.traffic
        ],
        "seconds": asdict(stage.seconds),
    }
