"""w1train.doctor finds and names faults of a machine, and ends with the right exit status."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from w1train import doctor
from w1train.diagnosis import devices, host, kernel_checks, kernel_findings, packages
from w1train.diagnosis.findings import Finding, Section, as_dict, failures, show
from w1train.diagnosis.kernel_checks import Check

CPU = torch.device("cpu")
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tNODE\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tPIX\t0-47\t0\t\tN/A
GPU2\tSYS\tNV18\t X \tPIX\t0-47\t0\t\tN/A
NIC0\tNODE\tPIX\tPIX\t X

Legend:

  X    = Self
"""


def test_plain_output_of_a_healthy_machine(tmp_path, capsys):
    assert doctor.main([f"--runs-dir={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"works( \(\d+ warnings\))?$", lines[-1])
    assert any(re.match(r"  ok +attention\.backend=sdpa +right in 12 cases", line) for line in lines)
    assert any("attention.backend=cudnn" in line and "it needs a GPU" in line for line in lines)
    assert {"installed", "devices", "host"} <= set(lines)
    assert list(tmp_path.iterdir()) == []


def test_quick_as_json_computes_nothing(capsys, monkeypatch):
    for module, name in ((devices, "bandwidths"), (kernel_checks, "run_check"), (host, "disk_finding")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a health check must disturb nobody"))
    assert doctor.main(["--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert [section["title"] for section in report["sections"]] == ["installed", "devices", "host"]
    assert {finding["status"] for section in report["sections"] for finding in section["findings"]} <= {"ok", "note", "warning"}


def test_a_kernel_that_computes_something_else_is_a_failure(monkeypatch, tmp_path, capsys):
    right = kernel_checks.BACKENDS["sdpa"].attend
    monkeypatch.setattr(kernel_checks.BACKENDS["sdpa"], "attend", lambda *args: 1.1 * right(*args))
    assert doctor.main([f"--runs-dir={tmp_path}"]) == 1
    out = capsys.readouterr().out
    assert "WRONG in 12 of 12 cases" in out
    assert "DOES NOT WORK: attention.backend=sdpa" in out.splitlines()[-1]


def test_checks_of_a_kernel_become_one_line():
    good, absent = Check("flex", "one", {"output": 1e-3}), Check("flex", "two", reason="no intervals")
    assert kernel_findings.summarize("flex", [good, absent]).value == "right in 1 of 2 cases"
    assert kernel_findings.summarize("flex", [absent]) == Finding("flex", "cannot serve", "note", "no intervals")
    raised = Check("flex", "three", reason="failed: OutOfMemoryError", failed=True)
    finding = kernel_findings.summarize("flex", [good, raised])
    assert (finding.status, finding.value) == ("failed", "WRONG in 1 of 2 cases")
    assert "three" in finding.detail
    assert "OutOfMemoryError" in finding.detail


def _distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_impostors_are_told_from_the_real_ones(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('an impostor must not be imported')\n")
    _distribution(tmp_path, "apex", "0.9.10.dev0")
    finding = packages.apex_finding()
    assert (finding.status, finding.value) == ("failed", "0.9.10.dev0")
    (tmp_path / "apex" / "optimizers").mkdir()
    assert packages.apex_finding().status == "warning"
    (tmp_path / "amp_C.py").touch()
    assert packages.apex_finding().status == "ok"


def test_dali_and_its_placeholder(tmp_path, monkeypatch):
    if packages.dali_finding({}).status == "ok":
        pytest.skip("DALI is installed here")
    monkeypatch.syspath_prepend(str(tmp_path))
    _distribution(tmp_path, "nvidia-dali", "0.0.1")
    assert packages.dali_finding({}).value == "placeholder"
    _distribution(tmp_path, "nvidia-dali-cuda130", "2.4.0")
    assert packages.dali_finding({}).value == "2.4.0 (nvidia-dali-cuda130)"
    assert packages.dali_finding({"nvidia-dali-cuda130": Requirement("nvidia-dali-cuda130>=3")}).status == "warning"


@pytest.mark.parametrize(
    ("version", "fits"), [("2.13.0a0+9186a08b2c.nv26.07", True), ("2.11.0", True), ("2.11.0a0+x.nv", True), ("2.10.1+cu130", False)]
)
def test_nvidias_pre_releases_count_as_the_release(version, fits):
    wrong = packages.out_of_range("torch", version, {"torch": Requirement("torch>=2.11")})
    assert wrong == ("" if fits else "w1train wants torch>=2.11")


def test_a_required_package_that_is_missing_or_broken_is_a_failure(tmp_path, monkeypatch):
    assert packages._required("no-such-package", {}).status == "failed"
    monkeypatch.syspath_prepend(str(tmp_path))
    _distribution(tmp_path, "broken-one", "1.0")
    monkeypatch.setitem(packages._MODULES, "broken-one", "broken_one")
    (tmp_path / "broken_one.py").write_text("import something_that_is_not_there\n")
    assert "something_that_is_not_there" in packages._required("broken-one", {}).detail


def test_a_health_check_beside_a_training_imports_nothing_that_opens_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packages, "import_megatron", lambda: pytest.fail("transformer-engine comes with it"))
    finding = packages._megatron({}, quick=True)
    assert (finding.status, finding.detail) == ("ok", "not imported: a training may be using the GPU")


@pytest.mark.parametrize(
    ("error", "status"),
    [(ImportError("libcuda.so.1: cannot open"), "warning"), (ImportError("no einops"), "failed"), (OSError("x"), "failed")],
)
def test_only_a_missing_driver_excuses_megatron(monkeypatch, error, status):
    def fail():
        raise error

    monkeypatch.setattr(packages, "import_megatron", fail)
    assert packages._megatron({}, quick=True).status == status


def test_the_version_of_an_image_is_said(monkeypatch):
    monkeypatch.setenv("W1TRAIN_CODE_VERSION", "abc123-dirty")
    assert packages.code_version().endswith("built from abc123-dirty")


def test_links_between_gpus_are_counted_by_kind():
    assert devices.link_kinds(TOPOLOGY) == {"NV18": 2, "SYS": 1}
    assert devices.link_kinds("") == {}


def test_gpus_as_nvidia_smi_describes_them(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 580.95, 81559 MiB, 700.00 W, 41, 1980 MHz, 1980 MHz, 2619 MHz, 5, 16'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (finding,) = devices._nvidia_smi()
    assert (finding.name, finding.value) == ("GPU 0", "NVIDIA H100 80GB HBM3")
    assert "power limit 700.00 W" in finding.detail
    program.write_text("#!/bin/sh\necho 580.95\necho 580.95\n")
    assert devices.driver_version() == "580.95"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert list(devices._nvidia_smi()) == []
    assert devices.driver_version() == "absent"


def test_a_disk_that_cannot_be_written_to(tmp_path, monkeypatch):
    assert host.disk_finding(tmp_path / "not" / "yet").status in ("ok", "warning")
    monkeypatch.setattr(host.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    finding = host.disk_finding(tmp_path)
    assert finding.status == "failed"
    assert "Read-only file system" in finding.detail


def test_limits_that_are_too_low_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (1024, 1_048_576))
    assert host._open_files().status == "warning"
    assert "ulimit -n 65536" in host._open_files().detail
    assert host._shared_memory(tmp_path / "absent").status == "warning"


def test_a_table_on_a_terminal(tmp_path):
    sections = [Section("one", [Finding("a[b]", "1"), Finding("c", "2", "failed", "[red]why[/red]")])]
    with (tmp_path / "out").open("w+") as file:
        show(sections, Console(file=file, force_terminal=True, width=100))
        file.seek(0)
        text = re.sub(r"\x1b\[[0-9;]*m", "", file.read())
    assert "[red]why[/red]" in text, "what others wrote is no markup"
    assert "a[b]" in text
    assert text.rstrip().endswith("DOES NOT WORK: c")
    assert not as_dict(sections)["ok"]
    assert [finding.name for finding in failures(sections)] == ["c"]


def test_a_local_rank_without_a_gpu_is_a_mistake_of_the_user(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert doctor.main([]) == 2
    assert "LOCAL_RANK is 3" in capsys.readouterr().err


def test_under_srun_a_task_is_a_rank(monkeypatch, tmp_path, capsys):
    """Otherwise each of sixteen tasks would think that it is alone, and all would use the first GPU."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "gpu1"}
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1", **step}.items():
        monkeypatch.setenv(name, value)
    assert doctor.main(["--quick", f"--runs-dir={tmp_path}"]) == 0
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("1", "2", "1")
    assert capsys.readouterr().out == "", "rank 0 speaks for all"
