"""Digests of many steps of every objective in every layout, to compare two versions of the code on one machine bit for bit.

    python -m tests.parallel.digests digests.json
    python -m tests.parallel.digests other.json --compare digests.json

Each digest is of a step's loss and of the bytes of every rank's gradients.
Another machine may round in another way, so no digest is kept in git.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.parallel.layouts import LEARNING_RATE, micro_batches, open_gates, world_size
from tests.parallel.test_layouts import LAYOUTS, OBJECTIVES, STREAMS, _name, layout_config
from w1train.config.argument_parser import ArgumentParser
from w1train.config.schema import Config
from w1train.runtime.distributed import distributed

NUM_STEPS = 20


def digest_layout(parallel: dict, data_parallel: int, names: Sequence[str]) -> dict[str, list[str]]:
    """Name of a stream or objective -> digest of each step, in one layout."""
    num_layers = 4 if parallel["pipeline"] > 1 else 2
    parallel = {**parallel, "sequence": parallel["tensor"] > 1, "distributed_optimizer": False}
    configs = [layout_config(name, data_parallel, num_layers=num_layers, **parallel) for name in names]
    results = run_distributed(_digest_all, world_size(configs[0], data_parallel), configs, process_group=False, timeout=600)
    return dict(zip(names, results[0], strict=True))


def _digest_all(_rank: int, _size: int, configs: Sequence[Config]) -> list[list[str]]:
    with distributed(configs[0].parallel) as ranks:
        return [_digests(config, ranks.data_parallel_rank, ranks.data_parallel_size) for config in configs]


def _digests(config: Config, data_parallel_rank: int, data_parallel_size: int) -> list[str]:
    from tests.parallel import layouts

    model = layouts.build_trained_model(config)
    open_gates(model)
    digests = []
    for step in range(NUM_STEPS):
        batches = list(micro_batches(config, step, data_parallel_rank, data_parallel_size))
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        model.optimizer.zero_grad()
        sums, _ = layouts.run_micro_batches(config, list(model.chunks), iter(batches), len(batches), training=True)
        mine = hashlib.sha256()
        for chunk in model.chunks:
            for buffer in chunk.buffers:
                mine.update(buffer.grad_data.contiguous().view(torch.uint8).numpy().tobytes())
        gathered = [""] * dist.get_world_size()
        dist.all_gather_object(gathered, mine.hexdigest())
        loss = layouts.loss_of(sums, config)
        digests.append(hashlib.sha256(json.dumps([float(loss).hex(), *gathered]).encode()).hexdigest()[:16])
        for group in model.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * group["lr_mult"]
        model.optimizer.step()
    return digests


def main(arguments: Sequence[str]) -> int:
    """Compute the digests, write them, and compare them with others; 1 where they differ."""
    parser = ArgumentParser(prog="python -m tests.parallel.digests", description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--compare", type=Path, help="digests of another version")
    options = parser.parse_args(arguments)
    names = [*STREAMS, *OBJECTIVES]
    found = {}
    started = time.monotonic()
    for number, (parallel, data) in enumerate(LAYOUTS, start=1):
        layout = _name((parallel, data))
        found[layout] = digest_layout(parallel, data, names)
        print(f"{number} of {len(LAYOUTS)}  {layout}  {time.monotonic() - started:.0f} s", flush=True)
    options.output.write_text(json.dumps(found, indent=1))
    if options.compare is None:
        return 0
    expected = json.loads(options.compare.read_text())
    differing = [f"{layout} {name}" for layout in expected for name in expected[layout] if found[layout][name] != expected[layout][name]]
    num_compared = sum(len(steps) for layout in expected.values() for steps in layout.values())
    print(f"{num_compared} steps compared, {len(differing)} objectives differ: {', '.join(differing)}")
    return 1 if differing or found.keys() != expected.keys() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
