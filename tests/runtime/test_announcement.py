"""The first line of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from w1train.runtime.announcement import ANNOUNCED, announce
from w1train.runtime.version import __version__

LOADING = "loading PyTorch and megatron-core\n"


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", ANNOUNCED):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["recipe=demo", "name=a"], {}, f"w1train {__version__}: recipe demo, 1 rank; {LOADING}"),
        (["recipe=demo"], {"RANK": "0", "WORLD_SIZE": "8"}, f"w1train {__version__}: recipe demo, 8 ranks; {LOADING}"),
        (["--nproc", "2", "recipe=demo"], {}, f"w1train {__version__}: recipe demo, 2 ranks; {LOADING}"),
        (["recipe=demo", "--nproc=1"], {}, f"w1train {__version__}: recipe demo, 1 rank; {LOADING}"),
        (["recipe=demo", "--nproc"], {}, f"w1train {__version__}: recipe demo, 1 rank; {LOADING}"),
        (["name=a"], {}, f"w1train {__version__}: no recipe, 1 rank; {LOADING}"),
        (["recipe=demo"], {"RANK": "1", "WORLD_SIZE": "8"}, ""),
        (["recipe=demo"], {ANNOUNCED: "1"}, ""),
        (["recipe=demo", "--cfg", "job"], {}, ""),
        (["recipe=demo", "--cfg=job"], {}, ""),
        (["--help"], {}, ""),
        (["-h"], {}, ""),
        (["--list"], {}, ""),
    ],
    ids=str,
)
def test_rank_0_says_once_what_is_about_to_be_trained(capsys, monkeypatch, arguments, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    announce(arguments)
    assert capsys.readouterr().out == expected


def test_the_line_comes_before_everything_that_takes_long():
    """Imports of torch, Hydra, rich or W&B would be seconds of silence on a busy machine."""
    program = (
        "import sys\n"
        "from w1train import pretrain\n"
        "def stop(*_, **__): raise SystemExit(str(sorted({'torch', 'hydra', 'rich', 'numpy', 'wandb'} & set(sys.modules))))\n"
        "pretrain.config_from_command_line = stop\n"
        "pretrain.main(['recipe=demo'])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == f"w1train {__version__}: recipe demo, 1 rank; {LOADING}"
    assert result.stderr == "[]\n"
