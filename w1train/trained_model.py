"""The model of a run's checkpoint, as the commands and the Python interface load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from w1train.config.errors import UserError
from w1train.config.serialization import config_from_yaml
from w1train.registered_names import require_registered_names

if TYPE_CHECKING:  # torch and megatron-core take seconds to import, which a mistyped RUN should not wait for
    from w1train.inference.predictor import InferenceModel
    from w1train.runtime.distributed import Ranks


def require_run(run: Path) -> None:
    """Raise FileNotFoundError if ``run`` is not a run directory. Nothing heavy is imported for this."""
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is not a run directory: it has no config.yaml")


def load_trained(run: Path, checkpoint: int | str | None, ranks: Ranks | None = None) -> InferenceModel:
    """Load the model of a run's checkpoint.

    Args:
        checkpoint, ranks: as in w1train.inference.predictor.load_for_inference.

    Raises:
        FileNotFoundError: the run or the checkpoint does not exist.
        UserError: the run's files cannot be used, or the checkpoint is damaged.
    """
    require_run(run)
    from w1train.runtime.megatron_on_cpu import import_megatron

    import_megatron()
    from w1train.checkpoints.manifest import CheckpointError
    from w1train.inference.predictor import load_for_inference

    require_registered_names(config_from_yaml(run / "config.yaml"), run / "config.yaml")
    try:
        return load_for_inference(run, checkpoint, ranks)
    except CheckpointError as error:
        raise UserError(str(error)) from error
