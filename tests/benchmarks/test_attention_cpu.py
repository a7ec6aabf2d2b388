"""The comparison runs, and would not report two things that differ. Times are never asserted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention import cpu as attention_cpu


def test_compares_every_workload(capsys):
    assert attention_cpu.main(["--length=64", "--heads=2", "--groups=1", "--channels=8", "--repetitions=2"]) == 0
    shown = capsys.readouterr().out
    assert "chosen" in shown
    assert len(list(attention_cpu.workloads(64))) == 10


def test_documents_fill_the_sample():
    documents = attention_cpu.lognormal_documents(1000, 100, torch.Generator().manual_seed(0))
    assert documents.shape == (1, 1000)
    assert (documents.diff() >= 0).all()
    assert int(documents.max()) > 2


def test_different_results_are_not_reported():
    one = [torch.ones(3)]
    attention_cpu._require_agreement("same", [one, one])
    with pytest.raises(AssertionError, match="same"):
        attention_cpu._require_agreement("not the same", [one, [torch.full((3,), 1.1)]])
