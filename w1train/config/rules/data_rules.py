"""Rules of the data: which corpora are read, and how they are packed."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import NOT_GIVEN, Problem, closest, listing, show
from w1train.config.rules.divisibility import divisors, does_not_divide
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config


def _corpora_rule(config: Config) -> Iterator[Problem]:
    """Check that there is a training dataset or a blend, not both, and that no two corpora of a blend are the same dataset."""
    data = config.data
    if data.train is None and not data.blend and not all(stage.train for stage in config.schedule.stages.values()):
        yield Problem("data.train", NOT_GIVEN, "the prefix of the training dataset, or several corpora in data.blend")
    elif data.train is not None and data.blend:
        yield Problem("data.train", show(data.train), f"null with data.blend, which names {listing(data.blend)}", "data.train=null")
    for name, corpus in data.blend.items():
        twins = [other for other, its in data.blend.items() if its.prefix == corpus.prefix and other < name]
        if twins:
            valid = f"another dataset than that of {listing(twins)}: two corpora of one dataset would read the same samples"
            yield Problem(f"data.blend.{name}.prefix", show(corpus.prefix), valid)


def _weights_rule(config: Config) -> Iterator[Problem]:
    """Check that every stage has a corpus to read."""
    blend = config.data.blend
    for name, stage in config.schedule.stages.items():
        key = f"schedule.stages.{name}.blend"
        if stage.blend and stage.train is not None:
            yield Problem(key, show(dict(stage.blend)), f"empty when schedule.stages.{name}.train is set: one or the other")
            continue
        for corpus in sorted(stage.blend.keys() - blend.keys()):
            match = closest(corpus, blend)
            valid = f"a name of data.blend: {listing(blend)}" if blend else "a name of data.blend, which is empty"
            yield Problem(f"{key}.{corpus}", "an unknown corpus", valid, f"did you mean {match}?" if match else None)
        if stage.blend and not any(weight > 0 for weight in stage.blend.values()):
            yield Problem(key, show(dict(stage.blend)), "at least one weight above 0: otherwise the stage has nothing to read")
    idle = [name for name, stage in config.schedule.stages.items() if not stage.blend and stage.train is None]
    if idle and blend and not any(corpus.weight > 0 for corpus in blend.values()):
        valid = f"at least one weight above 0: stage {listing(idle)} has nothing to read"
        yield Problem("data.blend", show({name: corpus.weight for name, corpus in blend.items()}), valid)


def _validation_sets_rule(config: Config) -> Iterator[Problem]:
    sets = config.data.validation_sets
    if sets and config.data.validation is None:
        yield Problem("data.validation_sets", listing(sets), "empty without data.validation: put the first of these datasets there")


def _packing_rule(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.align > 1 and data.packing == "cut":
        yield Problem("data.align", show(data.align), "1 with data.packing=cut: a sample begins in the middle of a document")
    elif does_not_divide(data.align, data.sequence_length):
        valid = f"a divisor of data.sequence_length ({data.sequence_length}): {divisors(data.sequence_length)}"
        yield Problem("data.align", show(data.align), valid)


def _fill_rule(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.fill == "none":
        return
    if data.packing == "cut" or (data.packing == "best_fit" and data.fill != "block"):
        valid = "none with data.packing=cut, where documents follow each other" if data.packing == "cut" else "none or block with best_fit"
        yield Problem("data.fill", data.fill, valid, "data.packing=separate")
    if data.fill == "block" and data.align == 1:
        yield Problem("data.align", "1", "the block size with data.fill=block: the fill goes to the next multiple of data.align")
    if data.eos == "drop":
        valid = "keep with data.fill: the fill consists of EOS tokens, so the first of them is the end of the document"
        yield Problem("data.eos", "drop", valid, "data.eos=keep")


def _loader_rule(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.loader == "dali" and data.num_workers == 0:
        yield Problem("data.num_workers", "0", "at least 1 with data.loader=dali, which reads ahead in processes of its own")


def _object_storage_rule(config: Config) -> Iterator[Problem]:
    data = config.data
    prefixes = {"data.train": data.train, "data.validation": data.validation}
    prefixes |= {f"data.blend.{name}.prefix": corpus.prefix for name, corpus in data.blend.items()}
    prefixes |= {f"data.validation_sets.{name}": prefix for name, prefix in data.validation_sets.items()}
    prefixes |= {f"schedule.stages.{name}.train": stage.train for name, stage in config.schedule.stages.items()}
    remote = [key for key, prefix in prefixes.items() if prefix is not None and "://" in prefix]
    if remote and data.cache_directory is None:
        yield Problem("data.cache_directory", "null", f"a local directory, to which the files of {listing(remote)} are copied")


DATA_RULES: tuple[Rule, ...] = (
    _corpora_rule,
    _weights_rule,
    _validation_sets_rule,
    _packing_rule,
    _fill_rule,
    _loader_rule,
    _object_storage_rule,
)
