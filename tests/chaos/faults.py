"""The faults. Each is a generator that the supervisor resumes every few milliseconds: it waits for its moment, strikes, and may do more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.disk import SmallDisk
from tests.chaos.hooks import hang_before_collective, nan_in_gradient
from tests.chaos.jobs import WORLD_SIZE
from tests.chaos.scene import CHECKPOINT_INTERVAL, NUM_STEPS, Scene, until
from tests.end_to_end.runs import Sabotage

Strike = Callable[[Scene], Iterator[None]]
_ALL = list(range(WORLD_SIZE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault."""

    name: str
    title: str
    """For the table."""
    strike: Strike
    max_restarts: int = 1
    """More of them, and the run did not get over its fault at once."""
    statuses: frozenset[int] = frozenset({1, -signal.SIGKILL, -signal.SIGTERM})
    """How ranks of a start that did not finish may end. SIGTERM is the launcher's, for the others of a rank that has failed."""
    evidence: str = ""
    """A regular expression for what the ranks must have said: proof that the fault hit what it was aimed at, and was understood."""
    overrides: Sequence[str] = ()
    hook: Callable[[Scene], Sabotage] | None = None
    torchrun: bool = False
    small_disk: bool = False
    skips: bool = False
    """The run must end as the run that skipped the same step, not as the undisturbed one."""


def _kill_one(scene: Scene) -> Iterator[None]:
    yield from scene.moment()
    scene.strike()
    scene.signal(signal.SIGKILL, [scene.random.choice(_ALL)])


def _kill_all(scene: Scene) -> Iterator[None]:
    yield from scene.moment()
    scene.strike()
    scene.signal(signal.SIGKILL, _ALL)


def _freeze(scene: Scene) -> Iterator[None]:
    """For ever: only the other rank can notice."""
    yield from scene.moment()
    scene.strike()
    scene.signal(signal.SIGSTOP, [scene.random.choice(_ALL)])


def _ask_to_stop(number: signal.Signals) -> Strike:
    """As Slurm does before it takes the machine away: of one rank, or of all."""

    def strike(scene: Scene) -> Iterator[None]:
        yield from scene.moment()
        scene.strike()
        assert scene.blow is not None
        if scene.blow.reached > 0:
            # Before the first step it may come before the ranks listen; from then on it must not simply kill them.
            scene.evidence = r"stopped by a signal at step \d+; the same command goes on from there"
        scene.signal(number, scene.random.choice([_ALL, _ALL, [0], [1]]))

    return strike


def _kill_in_save(scene: Scene) -> Iterator[None]:
    """The ranks are stopped for the look whether the checkpoint is still half written; if it is not, the next one is tried, sooner after
    its beginning: a fast machine writes one in 20 ms."""
    yield from scene.moment(last=NUM_STEPS - 3 * CHECKPOINT_INTERVAL)
    longest = 0.1
    while True:
        yield from until(scene.is_saving)
        time.sleep(scene.random.uniform(0.0, longest))
        longest /= 8
        scene.signal(signal.SIGSTOP, _ALL)
        if scene.is_saving():
            break
        scene.signal(signal.SIGCONT, _ALL)
        yield
    scene.strike()
    victims = scene.random.choice([_ALL, [0], [1]])
    scene.signal(signal.SIGKILL, victims)
    scene.signal(signal.SIGCONT, [rank for rank in _ALL if rank not in victims])


def _damage(harm: Callable[[Path, Scene], None]) -> Strike:
    """All ranks die, and a shard of the newest checkpoint is not what it was when they come back."""

    def strike(scene: Scene) -> Iterator[None]:
        yield from scene.moment(first=2 * CHECKPOINT_INTERVAL)
        yield from until(lambda: len(scene.complete_checkpoints()) >= 2 and bool(scene.pids))
        scene.strike()
        scene.signal(signal.SIGKILL, _ALL)
        while scene.pids:  # without letting the supervisor start the next ones
            time.sleep(0.001)
        *_, older, newest = scene.complete_checkpoints()
        assert scene.blow is not None
        scene.blow.saved = int(older.name.removeprefix("step_"))
        shard = scene.random.choice(sorted(newest.glob("*.shards")))
        scene.notes.append(f"{newest.name}/{shard.name}")
        harm(shard, scene)

    return strike


def _truncate(shard: Path, scene: Scene) -> None:
    os.truncate(shard, scene.random.randrange(shard.stat().st_size))


def _flip_bit(shard: Path, scene: Scene) -> None:
    with shard.open("r+b") as file:
        place = scene.random.randrange(shard.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << scene.random.randrange(8))]))


def _fill_disk(scene: Scene) -> Iterator[None]:
    """Somebody else's file takes the disk, all of it or so much that no checkpoint fits, until a save has failed."""
    yield from scene.moment(first=1)
    first_job = scene.job
    disk = SmallDisk(scene.run.runs_dir)
    left = scene.random.choice([0, scene.random.randrange(800_000)])
    scene.strike()
    scene.notes.append(disk.fill(left, list(scene.pids.values())))
    assert scene.blow is not None
    step = scene.blow.reached + CHECKPOINT_INTERVAL + 1
    yield from until(lambda: scene.newest_step() >= step or scene.job is not first_job)
    disk.free()


def _marked(name: str, then: Strike | None = None) -> Strike:
    """What a hook does, noticed by its mark."""

    def strike(scene: Scene) -> Iterator[None]:
        mark = scene.marks / name
        yield from until(mark.exists)
        scene.strike()
        if then is not None:
            yield from then(scene)

    return strike


def _kill_later(scene: Scene) -> Iterator[None]:
    """Some steps after a skip: what was skipped must be known after a restart too."""
    assert scene.blow is not None
    yield from scene.moment(scene.blow.reached, min(scene.blow.reached + 2 * CHECKPOINT_INTERVAL, NUM_STEPS - 4))
    scene.strike()
    scene.signal(signal.SIGKILL, _ALL)


def nan_hook(scene: Scene, *, once: bool) -> Sabotage:
    """NaN in a gradient; one that stays is at the step that was chosen for the layout, and the run to be compared with has it there too."""
    step = scene.random.randint(1, NUM_STEPS - 6) if once else scene.nan_step
    victim, parameter = scene.random.choice(_ALL), scene.random.randrange(1000)
    scene.notes.append(f"in parameter {parameter} of rank {victim} at step {step}")
    return nan_in_gradient(scene.marks / "nan", victim=victim, step=step, parameter=parameter, once=once)


def _hang_hook(scene: Scene) -> Sabotage:
    step, number = scene.random.randint(1, NUM_STEPS - 6), scene.random.randint(1, 20)
    scene.notes.append(f"before collective {number} after the start of step {step}")
    return hang_before_collective(scene.marks / "hang", victim=scene.random.choice(_ALL), step=step, number=number)


def _kill_worker(scene: Scene) -> Iterator[None]:
    """A process that reads ahead; by whom the kernel takes memory from."""

    def killed() -> bool:
        try:
            # Forked, so that they show their parent's command line; git, which is asked for the version of the code, does not.
            ranks = [psutil.Process(pid) for pid in scene.pids.values()]
            workers = [child for rank in ranks for child in rank.children() if child.cmdline() == rank.cmdline()]
            if workers:
                scene.random.choice(workers).kill()
        except psutil.NoSuchProcess:
            return False  # validation has workers of its own, which end with it
        return bool(workers)

    yield from scene.moment()
    yield from until(killed)
    scene.strike()


_STOPPED = frozenset({75, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGKILL, 1})

_HUNG = r"no progress for \d+ s at step \d+ \(health.hang_timeout\): rank [01] .*(is missing|is behind)"
_DAMAGED = r"is damaged and is now damaged-step_\d+; training goes on from step"

FAULTS = [
    Fault(name="kill", title="SIGKILL of one rank", strike=_kill_one),
    Fault(name="kill-all", title="SIGKILL of all ranks", strike=_kill_all),
    Fault(name="freeze", title="SIGSTOP of one rank", strike=_freeze, evidence=_HUNG),
    Fault(name="term", title="SIGTERM", strike=_ask_to_stop(signal.SIGTERM), statuses=_STOPPED),
    Fault(name="usr1", title="SIGUSR1", strike=_ask_to_stop(signal.SIGUSR1), statuses=_STOPPED),
    Fault(name="save", title="SIGKILL during a save", strike=_kill_in_save),
    Fault(name="truncate", title="a truncated shard", strike=_damage(_truncate), evidence=_DAMAGED),
    Fault(name="flip", title="a flipped bit in a shard", strike=_damage(_flip_bit), evidence=_DAMAGED),
    Fault(name="disk", title="a full disk", strike=_fill_disk, small_disk=True, evidence="could not save|No space left|File too large"),
    Fault(
        name="nan", title="NaN in a gradient, once", strike=_marked("nan"), hook=lambda scene: nan_hook(scene, once=True), max_restarts=0
    ),
    Fault(
        name="nan-again",
        title="NaN in a gradient, persistent, then SIGKILL",
        strike=_marked("nan", _kill_later),
        hook=lambda scene: nan_hook(scene, once=False),
        skips=True,
        evidence=r"step \d+ is left out",
    ),
    Fault(
        name="worker",
        title="SIGKILL of a data worker",
        strike=_kill_worker,
        overrides=("data.workers=process",),
        evidence="data worker .* died",
    ),
    Fault(name="hang", title="a hung collective", strike=_marked("hang"), hook=_hang_hook, evidence=_HUNG),
    Fault(name="torchrun", title="SIGKILL of one rank under torchrun", strike=_kill_one, torchrun=True),
]
