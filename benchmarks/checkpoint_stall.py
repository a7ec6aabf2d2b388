"""How long training stands still for a checkpoint: the save in the background beside the one that is waited for.

    python -m benchmarks.checkpoint_stall --report

A model of 200 million parameters of W1's shape is trained in bf16 with fp32 masters and moments (14 bytes a parameter in the checkpoint),
one process, on the CPU. Both kinds of save write the same state into the same file system, in turn: a save that is waited for, then one
in the background with training steps beside it, and again. The first of each is reported apart: it plans what goes where, and the one in
the background takes its host memory.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from w1train.config.schema import Config
from w1train.config.schema_operation import CheckpointConfig
from w1train.runtime.cpu import import_megatron

import_megatron()
