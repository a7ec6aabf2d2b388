"""The kinds of datasets that the objectives of a run can learn: text, conversations, and pairs of replies.

A dataset's manifest says its kind. What a run cannot learn from a kind would otherwise be trained on without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from w1train.config.schema import Config
from w1train.config.stages import at_stage, has_preferences
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.packed.separate import check_lengths
from w1train.diffusion.processes import noise_process


def kind_of(dataset: TokenDataset) -> str | None:
    """Return what the documents of a dataset are, as its manifest says: "conversations" or "preferences"; None for other datasets."""
    return None if dataset.manifest is None else dataset.manifest.conversations.get("kind")


def check_kinds(config: Config, datasets: Mapping[str, TokenDataset], prefixes: Mapping[str, Collection[str]]) -> None:
    """Compare the datasets, by their prefixes, with the objective of each stage that reads them.

    Args:
        prefixes: the prefixes that each stage reads.

    Raises:
        DatasetError: a stage of preferences reads conversations, another stage reads pairs of replies, of which it would learn both, or
            learned replies see what follows them.
    """
    for name in config.schedule.stages:
        has_pairs = at_stage(config, name).diffusion.preference_draws > 0
        for prefix in prefixes[name]:
            kind = kind_of(datasets[prefix]) if prefix in datasets else None
            if prefix in datasets:
                _check_replies(config, name, prefix, datasets[prefix])
            if has_pairs and kind == "conversations":
                raise DatasetError(
                    f"dataset {prefix} has conversations, and stage {name} has diffusion.preference_draws, which needs pairs of replies: "
                    "`w1train data conversations` writes pairs from rows that have chosen and rejected"
                )
            if not has_pairs and kind == "preferences":
                raise DatasetError(
                    f"dataset {prefix} has pairs of replies, and stage {name} would learn the rejected replies too: set "
                    "diffusion.preference_draws, or make a dataset of conversations from the chosen replies"
                )


def _check_replies(config: Config, name: str, prefix: str, dataset: TokenDataset) -> None:
    """Raise DatasetError if replies are learned that see what follows them: only blocks hide the turns after a reply from the reply."""
    replies = {} if dataset.manifest is None else dataset.manifest.conversations
    diffusion = at_stage(config, name).diffusion
    sees_all = (
        not noise_process(diffusion).is_causal and (diffusion.block_size or config.data.sequence_length) >= config.data.sequence_length
    )
    if replies.get("replies") == "all" and sees_all:
        raise DatasetError(
            f"all replies of dataset {prefix} are learned, and in stage {name} a reply sees the turns after it: set diffusion.block_size "
            "below data.sequence_length, or write the dataset again with --replies last or --replies split"
        )


def check_validation_kind(config: Config, prefix: str, dataset: TokenDataset) -> None:
    """Compare a validation dataset with the objectives of the run.

    Raises:
        DatasetError: the dataset has no pairs of replies in a run of preferences, or has pairs in another run.
    """
    kind = kind_of(dataset)
    if has_preferences(config) and (kind == "conversations" or not dataset.limits_noise):
        raise DatasetError(
            f"validation dataset {prefix} has no pairs of replies, which diffusion.preference_draws needs: `w1train data conversations` "
            "writes pairs from rows that have chosen and rejected; data.validation=null leaves validation out"
        )
    if kind == "preferences" and not has_preferences(config):
        raise DatasetError(
            f"validation dataset {prefix} has pairs of replies, and no stage has diffusion.preference_draws: give conversations"
        )


def check_whole_conversations(config: Config, dataset: TokenDataset) -> None:
    """Check that no conversation is cut: a reply without its prompt, or a prompt without its reply, would be trained.

    Raises:
        DatasetError: data.packing cuts documents, or a conversation is longer than a sample.
    """
    if kind_of(dataset) is None:
        return
    if config.data.packing == "cut":
        raise DatasetError(f"dataset {dataset.prefix} has conversations, and data.packing=cut would cut them: set best_fit or separate")
    check_lengths(dataset, config.data.sequence_length, config.data.eos)
