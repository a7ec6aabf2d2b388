"""What the command refuses, and what it records of an average."""

from __future__ import annotations

from pathlib import Path

import pytest

from w1train.config.errors import UserError
from w1train.runtime.megatron_on_cpu import import_megatron
from w1train.runtime.record_files import MetricsLog

import_megatron()


def test_an_average_is_recorded_again_if_it_is_scored_otherwise(tmp_path):
    from w1train.evaluation.averages import _is_recorded

    comparison = {"checkpoint": "average_1", "members": [1, 2], "elbo": 3.0, "time/seconds": 1.0}
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"kind": "train", "step": 2, **comparison, "elbo": 4.0})
        log.append({"kind": "average", "step": 2, "tokens": 64, **comparison})
    assert _is_recorded(tmp_path, {**comparison, "time/seconds": 2.0})
    assert not _is_recorded(tmp_path, {**comparison, "elbo": 4.0})
    assert not _is_recorded(tmp_path, {**comparison, "checkpoint": "average_2"})


@pytest.mark.parametrize("output", [".", "/"])
def test_an_output_without_a_name_is_refused(tmp_path, output):
    from w1train.evaluation.averages import AverageRequest, average_run

    request = AverageRequest(tmp_path, None, None, [1, 2], Path(output), evaluate=False)
    with pytest.raises(UserError, match="names a directory that exists: the name of a new directory is needed"):
        average_run(request)
