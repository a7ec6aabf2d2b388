"""One training run in one layout, as numbers that can be compared: losses, gradients, parameters and the noise itself."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.parallel.routing import Routing, noted_routing, open_router, routers
from tests.tiny import packed_batch
from w1train.config.schema import Config
from w1train.data.batch import PackedBatch
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from megatron.core import parallel_state  # noqa: E402

from tests.saving import save_now  # noqa: E402
from w1train.checkpoints.loading import load_checkpoint  # noqa: E402
from w1train.checkpoints.manifest import Progress  # noqa: E402
from w1train.diffusion.corruption import NoisyBatch, corrupt  # noqa: E402
from w1train.engine.building import TrainedModel, build_trained_model  # noqa: E402
from w1train.model.initialization import EXPERTS, global_named_parameters  # noqa: E402
from w1train.runtime.distributed import Ranks, distributed  # noqa: E402
from w1train.training import forward  # noqa: E402
from w1train.training.companions import FrozenModel, require_unchanged  # noqa: E402
from w1train.training.forward import StepWork, run_micro_batches  # noqa: E402
from w1train.training.inputs import RankInputs  # noqa: E402
from w1train.training.measurement import measured  # noqa: E402

NUM_STEPS = 3
LEARNING_RATE = 1e-4


@dataclass
class Inputs:
    """What was made for the model."""

    count: int = 0
    """Micro-batches, of all steps."""
    travels: set[str] = field(default_factory=set)
    """What the context-parallel ranks exchange in them; empty without context parallelism."""


@dataclass
class Outcome:
    """What a layout computed."""

    losses: list[float]
    gradient_norms: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step, whole tensors in fp32 under global names (empty with the distributed optimizer, which keeps slices)."""
    parameters: dict[str, torch.Tensor]
    """After the last step."""
    noise: str
    """Hash of every corrupted input of every step, in sample order."""
    work: list[StepWork]
    inputs: Inputs
    biases: dict[int, torch.Tensor]
    """The biases of experts after the last step, by the number of the layer, which begins at 1."""
    balance: list[dict[str, Any]]
    """The metrics of each step about the balance of experts."""
    routing: Routing
    """The decisions of the routers of a mixture of experts; empty for a dense model."""


def world_size(config: Config, data_parallel: int) -> int:
    """Ranks of a layout."""
    parallel = config.parallel
    return parallel.tensor * parallel.pipeline * parallel.context * data_parallel


def train_layout(
    config: Config,
    data_parallel: int = 1,
    *,
    mutate: Callable[[TrainedModel], None] | None = None,
    load: Path | None = None,
    save: Path | None = None,
    num_steps: int = NUM_STEPS,
    timeout: float = 120,
) -> Outcome:
    """Train ``num_steps`` steps in the layout on forked ranks.

    ``mutate`` breaks the built model on purpose; ``load`` is a checkpoint to go on from, ``save`` where to write one at the end.
    """
    (outcome,) = train_layouts([config], data_parallel, mutate=mutate, load=load, save=save, num_steps=num_steps, timeout=timeout)
    return outcome


def train_layouts(
    configs: Sequence[Config],
    data_parallel: int = 1,
    *,
    mutate: Callable[[TrainedModel], None] | None = None,
    load: Path | None = None,
    save: Path | None = None,
    num_steps: int = NUM_STEPS,
    timeout: float = 240,
) -> list[Outcome]:
    """Call ``train_layout`` for several configurations of one layout on the same ranks, because forking them and making their groups takes
    longer than the steps. The configurations may differ in what the groups do not depend on, such as recomputation."""
    assert all(_group_sizes(config) == _group_sizes(configs[0]) for config in configs)
    size = world_size(configs[0], data_parallel)
    results = run_distributed(_train_all, size, configs, mutate, load, save, num_steps, process_group=False, timeout=timeout)
    for result in results:
        assert [outcome.losses for outcome in result] == [outcome.losses for outcome in results[0]], "every rank reports the same loss"
    return results[0]


def _group_sizes(config: Config) -> tuple[int, ...]:
    """Return what the process groups depend on."""
    parallel = config.parallel
    return parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context, parallel.expert, parallel.expert_tensor


def _train_all(_rank: int, _size: int, configs: Sequence[Config], *how: Any) -> list[Outcome]:
    with distributed(configs[0].parallel) as ranks:
        return [_train(ranks, config, *how) for config in configs]


def _train(
    ranks: Ranks,
    config: Config,
    mutate: Callable[[TrainedModel], None] | None,
    load: Path | None,
    save: Path | None,
    num_steps: int,
) -> Outcome:
    model = build_trained_model(config)
    open_gates(model)
    reference = frozen_reference(config) if config.diffusion.preference_draws else None
    first_step = load_checkpoint(load, model).step if load is not None else 0
    if mutate is not None:
        mutate(model)
    losses, norms, works, noise, balance = [], [], [], [], []
    gradients: dict[str, torch.Tensor] = {}
    inputs, routing = Inputs(), Routing()
    for step in range(first_step, first_step + num_steps):
        batches = list(micro_batches(config, step, ranks.data_parallel_rank, ranks.data_parallel_size, model.noise_rates()))
        noise.append(_noise_hashes(batches))
        model.zero_gradients()
        known = measured(config, list(model.chunks), iter(batches), len(batches), reference)
        with _noted(inputs), noted_routing(routing, step):
            metrics, work = run_micro_batches(config, list(model.chunks), known, len(batches), training=True)
        if step == first_step and not config.parallel.distributed_optimizer:
            gradients = whole_tensors(model, lambda parameter: parameter.main_grad if parameter.requires_grad else parameter * 0)
        for group in model.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * group["lr_mult"]
        balance.append({**model.expert_balance.gather(), **model.expert_balance.details()})
        norms.append(float(model.optimizer.step()[1]))
        model.expert_balance.move_bias()
        losses.append(loss_of(metrics, config))
        works.append(work)
    model.gather_parameters()
    if reference is not None:
        require_unchanged(reference)
    if save is not None:
        save_now(save, model, Progress(step=first_step + num_steps, samples=0))
    parameters = whole_tensors(model, lambda parameter: parameter.data)
    observed = routing.of_all_ranks(model.stages)
    return Outcome(losses, norms, gradients, parameters, _join(noise), works, inputs, expert_biases(model), balance, observed)


def loss_of(metrics: dict[str, Any], _config: Config) -> float:
    """The step's loss over all ranks."""
    return metrics["loss"]


@contextmanager
def _noted(notes: Inputs) -> Iterator[None]:
    """Note the inputs of the micro-batches that run."""
    original = forward.rank_inputs

    def noted(noisy: NoisyBatch, config: Config) -> RankInputs:
        inputs = original(noisy, config)
        exchange = inputs.model.attention_plan.exchange
        notes.count += 1
        notes.travels.update([] if exchange is None else [exchange.travel])
        return inputs

    forward.rank_inputs = noted
    try:
        yield
    finally:
        forward.rank_inputs = original


def open_gates(model: TrainedModel) -> None:
    """Give modulations and biases a value: with gates at zero the layers are identities and half of the gradients zero, and of a
    parameter that starts at zero only rounding is left to compare."""
    open_stages(model.stages)
    model.optimizer.reload_model_params()


def open_stages(stages: Sequence[Any]) -> None:
    """Give the stages of a model what ``open_gates`` gives them."""
    tensor_rank, tensor_size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for stage in stages:
            for name, parameter in global_named_parameters(stage):
                if "modulation." in name or "noise_rates." in name or name.endswith("bias"):
                    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
                    is_split = getattr(parameter, "tensor_model_parallel", False)
                    rank, size = (tensor_rank, tensor_size) if is_split else (0, 1)
                    whole = torch.randn((size * parameter.shape[0], *parameter.shape[1:]), generator=generator)
                    parameter.copy_(whole.chunk(size)[rank] * 0.3)
        for router in routers(stages):
            open_router(router)


def frozen_reference(config: Config) -> FrozenModel:
    """A reference with random weights of its own, whose modulations and biases have values too."""
    training = dataclasses.replace(config.training, seed=config.training.seed + 1)
    return FrozenModel(dataclasses.replace(config, training=training), open_stages, "random weights")


def micro_batches(config: Config, step: int, rank: int, size: int, rates: torch.Tensor | None = None) -> Iterator[NoisyBatch]:
    """This data-parallel rank's micro-batches of a step, as the loader deals them."""
    training = config.training
    first = step * training.global_batch_size
    for start in range(first + rank * training.micro_batch_size, first + training.global_batch_size, size * training.micro_batch_size):
        samples = range(start, start + training.micro_batch_size)
        noisy = corrupt(texts_of(samples, config), config.diffusion, training.seed, rates=rates)
        noisy.annealed, noisy.first_sample = 0.3, first
        yield noisy


def texts_of(samples: range, config: Config) -> PackedBatch:
    """The samples of a micro-batch, in which coupled draws, and the draws of a reply, have the same text. Replies have a prompt."""
    diffusion = config.diffusion
    if not diffusion.coupled_draws and not diffusion.preference_draws:
        return packed_batch(samples, config.data.sequence_length)
    texts = packed_batch([sample // diffusion.samples_per_text for sample in samples], config.data.sequence_length)
    if diffusion.preference_draws:
        texts.may_be_noised[:, :6] = False
    return dataclasses.replace(texts, sample_indices=torch.tensor(samples))


def whole_tensors(model: TrainedModel, value: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Global name -> whole tensor, from all tensor-parallel ranks and stages of data- and context-parallel rank 0, and for experts from
    those of expert-data-parallel rank 0; rank 0's answer alone (as NumPy arrays, that pickle ten times as fast: with tensors, and on every
    rank, this took as long as the steps)."""
    parts = {}
    is_first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    for chunk, stage in enumerate(model.stages):
        for name, parameter in global_named_parameters(stage):
            dimension = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            place = (parallel_state.get_pipeline_model_parallel_rank(), chunk)
            rank = parallel_state.get_tensor_model_parallel_rank()
            if EXPERTS in name:
                rank = (parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank())
            if parallel_state.get_expert_data_parallel_rank() == 0 if EXPERTS in name else is_first:
                parts[name, place, rank] = (value(parameter).detach().float().numpy(), dimension)
    gathered: list[dict] | None = [{} for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather_object(parts, gathered)
    if gathered is None:
        return {}
    merged = {key: (torch.from_numpy(array), dimension) for ranks in gathered for key, (array, dimension) in ranks.items()}
    return {name: _whole(name, merged) for name in {key[0] for key in merged}}


def expert_biases(model: TrainedModel) -> dict[int, torch.Tensor]:
    """The biases of the experts of all layers, which all ranks that have a layer must have alike to the last bit."""
    gathered: list[Any] = [None] * dist.get_world_size()
    own = {router.layer_number: router.expert_bias for router in routers(model.stages) if router.expert_bias is not None}
    dist.all_gather_object(gathered, own)
    biases: dict[int, torch.Tensor] = {}
    for layer, bias in (entry for rank in gathered for entry in rank.items()):
        assert torch.equal(biases.setdefault(layer, bias), bias), f"the ranks have other biases in layer {layer}"
    return biases


def _whole(name: str, parts: dict) -> torch.Tensor:
    """Join the tensor-parallel slices; replicas (other stages, replicated parameters) must agree to the last bit."""
    joined = []
    for place in sorted({place for other, place, _ in parts if other == name}):
        slices = [parts[key] for key in sorted(parts) if key[:2] == (name, place)]
        tensors, dimension = [tensor for tensor, _ in slices], slices[0][1]
        if dimension is None:
            joined += tensors
        elif EXPERTS in name:
            experts = sorted({key[2][0] for key in parts if key[:2] == (name, place)})
            rows = [[parts[key][0] for key in sorted(parts) if key[:2] == (name, place) and key[2][0] == expert] for expert in experts]
            joined.append(torch.cat([torch.cat(row, dim=dimension) for row in rows]))
        elif "linear_fc1" in name:
            halves = [tensor.chunk(2) for tensor in tensors]
            joined.append(torch.cat([half[0] for half in halves] + [half[1] for half in halves]))
        else:
            joined.append(torch.cat(tensors, dim=dimension))
    assert all(torch.equal(joined[0], other) for other in joined), f"replicas of {name} differ"
    return joined[0]


def _noise_hashes(batches: list[NoisyBatch]) -> list[str]:
    """Hashes of the corrupted samples of all data-parallel ranks; asserts that the ranks of a replica corrupt alike."""
    mine = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for batch in batches for row in batch.input_ids]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (parallel_state.get_data_parallel_rank(), mine))
    by_rank = dict(gathered)
    assert all(by_rank[rank] == hashes for rank, hashes in gathered), "model-parallel ranks corrupt alike"
    return [text for rank in sorted(by_rank) for text in by_rank[rank]]


def _join(noise: list[list[str]]) -> str:
    """One hash that does not depend on how the samples were dealt to ranks and micro-batches."""
    return hashlib.sha256("".join(text for step in noise for text in sorted(step)).encode()).hexdigest()
