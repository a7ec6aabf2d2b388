"""The check of the names that an option takes from a table: noise processes, losses, rules of sampling, attention backends, optimizers.

The tables belong to the packages whose objects they name, and an entry there is all that makes a name valid. The schema is below these
packages in the order of imports, so it takes any text. The commands that start or plan a run check these rules beside those of the schema,
and the commands that compute with a run check the configuration of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from w1train.config.errors import ConfigurationError, Problem, unknown_name
from w1train.config.rules.attention_rules import attention_rule
from w1train.config.rules.diffusion_rules import autoregressive_rule, causal_block_rule
from w1train.config.rules.rule import OWN_PROCESSES, ProcessRule, Rule, at_every_stage, is_causal_here
from w1train.config.rules.sampling_rules import OWN_ORDERS, denoising_rule, threshold_problems
from w1train.config.schema import Config


def _processes() -> Collection[str]:
    from w1train.diffusion.processes import PROCESSES

    return PROCESSES


def _losses() -> Collection[str]:
    from w1train.objectives.losses import LOSSES

    return LOSSES


def _orders() -> Collection[str]:
    from w1train.sampling.rules import ORDERS

    return ORDERS


def _revisers() -> Collection[str]:
    from w1train.sampling.revisers import REVISERS

    return REVISERS


def _backends() -> Collection[str]:
    from w1train.attention.backends.choice import BACKENDS

    return ["auto", *BACKENDS]


def _optimizers() -> Collection[str]:
    from w1train.runtime.megatron_on_cpu import import_megatron

    import_megatron()
    from w1train.engine.optimizers import OPTIMIZERS

    return OPTIMIZERS


def _name_rule(section: str, field: str, names: Callable[[], Collection[str]], *usual: str | None) -> Rule:
    """Return the rule of an option.

    Args:
        names: returns the table. Its import takes seconds.
        usual: names that are known to be in the table, so that most runs do not wait for the import. A new name need not be among them.
    """

    def rule(config: Config) -> Iterator[Problem]:
        name = getattr(getattr(config, section), field)
        if name not in usual and name not in (valid := names()):
            yield unknown_name(f"{section}.{field}", name, valid)

    return rule


def _of_further_processes(rule: ProcessRule) -> Rule:
    """Return the rule for processes that do not come with w1train. Beside the rules of the schema, it reports what those cannot know."""

    def checked(config: Config) -> Iterator[Problem]:
        name = config.diffusion.objective
        if name in OWN_PROCESSES or name not in _processes():
            return
        known = list(rule(config, is_causal_here(config.diffusion)))
        yield from (problem for problem in rule(config, _is_causal(config)) if problem not in known)

    return checked


def _is_causal(config: Config) -> bool:
    """Return whether a registered process is causal, as it says itself."""
    if (known := OWN_PROCESSES.get(config.diffusion.objective)) is not None:
        return known
    from w1train.diffusion.processes import noise_process

    return noise_process(config.diffusion).is_causal


def _process_rule(config: Config) -> Iterator[Problem]:
    """Report what the noise process cannot work with. The usual processes need no check, so most runs do not wait for the import."""
    diffusion = config.diffusion
    if diffusion.objective == "autoregressive" or (diffusion.objective == "diffusion" and diffusion.noise_schedule == "linear"):
        return
    from w1train.diffusion.process_checks import process_problems

    if diffusion.objective in _processes():
        yield from process_problems(config)


def _threshold_rule(config: Config) -> Iterator[Problem]:
    """Report a threshold with scores that are not log-probabilities, if the order or the process does not come with w1train."""
    order, objective = config.sampling.remasking, config.diffusion.objective
    if config.sampling.threshold is None or (order in OWN_ORDERS and objective in OWN_PROCESSES):
        return
    from w1train.sampling.rules import ORDERS

    if order in ORDERS and objective in _processes() and not _is_causal(config):
        yield from threshold_problems(config.sampling, ORDERS[order].are_log_probabilities)


def _objective_rule(config: Config) -> Iterator[Problem]:
    """Report a loss, a weight, positions or a prediction that do not go with each other or with the process. The rules import the losses,
    which takes seconds, so they are left out for what always goes together."""
    diffusion = config.diffusion
    if all(getattr(diffusion, name) in usual for name, usual in _USUAL.items()):
        return
    from w1train.diffusion.schedules import SCHEDULES

    # Names that are not registered are reported by the rules of names, and nothing can be made of them.
    if diffusion.objective in _processes() and diffusion.noise_schedule in SCHEDULES and diffusion.loss in _losses():
        from w1train.objectives.compatibility import objective_problems

        yield from objective_problems(config)


_USUAL = {
    "objective": ("diffusion", "autoregressive"),
    "loss": ("cross_entropy",),
    "weight": ("inverse_t", "elbo", "inverse_fraction", "constant", "one_minus_t"),
    "weight_max": (None,),
    "mask_embedding_noise": (0.0,),
}
"""Values with which every other field of the objective goes."""


def _kernel_rule(config: Config) -> Iterator[Problem]:
    """Report a kernel that is not registered, or that cannot sample from a model of the process."""
    sampling, diffusion = config.sampling, config.diffusion
    if sampling.kernel is None and diffusion.objective in ("diffusion", "autoregressive"):
        return  # the default kernel serves masked diffusion, and an autoregressive stage has its own way
    from w1train.diffusion.process_checks import process_problems
    from w1train.sampling.kernels import KERNELS, kernel_problems

    if sampling.kernel is not None and sampling.kernel not in KERNELS:
        yield unknown_name("sampling.kernel", sampling.kernel, KERNELS)
    # A process that cannot be made is reported by its own rule.
    elif diffusion.objective in _processes() and not _is_causal(config) and not any(process_problems(config)):
        by_block = diffusion.block_size is not None and diffusion.block_size < config.data.sequence_length
        yield from kernel_problems(sampling, diffusion, by_block)


NAME_RULES: tuple[Rule, ...] = (
    at_every_stage(_name_rule("diffusion", "objective", _processes, *OWN_PROCESSES)),
    at_every_stage(_name_rule("diffusion", "loss", _losses, "cross_entropy")),
    _name_rule("sampling", "remasking", _orders, *OWN_ORDERS),
    _name_rule("sampling", "reviser", _revisers, None, "conditional_modes", "self_correction"),
    _name_rule("attention", "backend", _backends, "auto", "cudnn", "flex", "te", "sdpa", "reference"),
    _name_rule("optimizer", "name", _optimizers, "adamw", "muon"),
    *(at_every_stage(_of_further_processes(rule)) for rule in (causal_block_rule, autoregressive_rule, denoising_rule, attention_rule)),
    at_every_stage(_process_rule),
    at_every_stage(_threshold_rule),
    at_every_stage(_objective_rule),
    at_every_stage(_kernel_rule),
)
"""A rule for each option whose values are names in a table, and the rules that depend on an entry of a table."""


def require_registered_names(config: Config, origin: Path) -> None:
    """Refuse the configuration of a run if it has names that are not registered, or that cannot be used together.

    Args:
        origin: the file that the configuration comes from.

    Raises:
        ConfigurationError: with every such problem.
    """
    if problems := [problem for rule in NAME_RULES for problem in rule(config)]:
        raise ConfigurationError(problems, origin=str(origin))
