"""The faults. Each is a generator that the supervisor continues every few milliseconds: it waits for its moment, strikes, and may do
more."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.disk import SmallDisk
from tests.chaos.file_hooks import fail_files, kill_at_change, slow_file
from tests.chaos.hooks import hang_before_collective, kill_at_phase_end, nan_in_gradient, shift_clock
from tests.chaos.jobs import WORLD_SIZE
from tests.chaos.scene import (
    CHECKPOINT_INTERVAL,
    HANG_SECONDS,
    NUM_PHASES,
    NUM_STEPS,
    SECONDS_TO_START,
    Scene,
    after,
    other_layouts,
    until,
)
from tests.chaos.storage import fail, lie, upload_hook
from tests.end_to_end.runs import Sabotage

Strike = Callable[[Scene], Iterator[None]]
_ALL = list(range(WORLD_SIZE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault."""

    name: str
    title: str
    """The name in tables."""
    strike: Strike
    max_restarts: int = 1
    """The most restarts of a run that recovers at once."""
    statuses: frozenset[int] = frozenset({1, -signal.SIGKILL, -signal.SIGTERM})
    """The exit statuses that ranks of a start that did not finish may have. The launcher sends SIGTERM to the others when a rank has
    failed."""
    evidence: str = ""
    """A regular expression for what the ranks must have logged, which proves that the fault struck where it should and was recognized."""
    overrides: Sequence[str] = ()
    hook: Callable[[Scene], Sabotage] | None = None
    torchrun: bool = False
    small_disk: bool = False
    is_hang: bool = False
    """True: the first start has short limits, so that its watchdog is tested. All other starts have limits that even a slow machine never
    meets."""
    uploads: bool = False
    """This flag tells whether checkpoints are uploaded to the scene's bucket."""
    phases: bool = False
    """This flag tells whether the run has phases, each of which ends with an average."""
    changes_layout: bool = False
    """True: the starts after the first have another layout. The run must end as a run that was stopped at the same checkpoint to change
    its layout."""
    skips: bool = False
    """This flag tells whether the run must end as a run that skipped the same step, and not as the undisturbed run."""


def _kill_one(scene: Scene) -> Iterator[None]:
    yield from scene.moment()
    scene.strike()
    scene.signal(signal.SIGKILL, [scene.random.choice(_ALL)])


def _kill_all(scene: Scene) -> Iterator[None]:
    yield from scene.moment()
    scene.strike()
    scene.signal(signal.SIGKILL, _ALL)


def _kill_twice(scene: Scene) -> Iterator[None]:
    """Kill all ranks, and kill them again while they start or in their first steps."""
    yield from _kill_all(scene)
    first_job = scene.job
    yield from until(lambda: scene.job is not first_job and bool(scene.pids))
    delay = scene.random.uniform(0.0, SECONDS_TO_START)
    scene.notes.append(f"and again {delay:.2f} s after the restart")
    yield from after(delay)
    scene.signal(signal.SIGKILL, _ALL)


def _kill_and_change_layout(scene: Scene) -> Iterator[None]:
    scene.next_layout = scene.random.choice(other_layouts(scene.layout))
    scene.notes.append(f"then {scene.next_layout}")
    yield from _kill_one(scene)


def _freeze(scene: Scene) -> Iterator[None]:
    """Stop one rank for ever, which only the other rank can notice. It strikes after the ranks have met: before, the other rank would only
    log that it cannot meet the stopped one."""
    yield from scene.moment(first=1)
    scene.strike()
    victim = scene.random.choice(_ALL)
    scene.evidence = _who_hangs(victim, "is missing")
    scene.signal(signal.SIGSTOP, [victim])


def _who_hangs(victim: int, how: str) -> str:
    """Return a regular expression for the message of the watchdog."""
    return rf"no progress for \d+ s at step \d+ \(health.hang_timeout\): rank {victim} .*{how}"


def _freeze_and_thaw(scene: Scene) -> Iterator[None]:
    """Stop ranks for longer than a save takes and continue them, at any moment or in the middle of a save."""
    yield from scene.moment()
    if scene.random.random() < 0.5:
        yield from until(scene.is_saving)
    victims, seconds = scene.random.choice([_ALL, [0], [1]]), scene.random.uniform(0.5, 2.0)
    scene.strike()
    scene.signal(signal.SIGSTOP, victims)
    scene.notes.append(f"ranks {victims} for {seconds:.1f} s")
    yield from after(seconds)
    scene.signal(signal.SIGCONT, victims)


def _ask_to_stop(number: signal.Signals) -> Strike:
    """Return a fault that sends a signal to one rank or to all ranks, as Slurm does before it takes the machine away."""

    def strike(scene: Scene) -> Iterator[None]:
        yield from scene.moment()
        scene.strike()
        assert scene.blow is not None
        if scene.blow.reached > 0:
            # Before the first step, the signal may come before the ranks handle it. From then on it must not simply kill them.
            scene.evidence = r"was stopped by SIG\w+ after step \d+ of \d+; the same command resumes from step \d+"
        scene.signal(number, scene.random.choice([_ALL, _ALL, [0], [1]]))

    return strike


def _kill_in_save(scene: Scene) -> Iterator[None]:
    """Kill ranks during a save. The ranks are stopped first, to see whether the checkpoint is still being written. If it is not, the next
    save is tried, sooner after its beginning: a fast machine writes a checkpoint in 20 ms."""
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


def _damage(harm: Callable[[Path, Scene], object]) -> Strike:
    """Return a fault that kills all ranks and damages a shard of the newest checkpoint before they are started again."""

    def strike(scene: Scene) -> Iterator[None]:
        yield from scene.moment(first=2 * CHECKPOINT_INTERVAL)
        yield from until(lambda: len(scene.complete_checkpoints()) >= 2 and bool(scene.pids))
        scene.strike()
        scene.signal(signal.SIGKILL, _ALL)
        while scene.pids:  # without a yield, so that the supervisor does not start the next ranks
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


def _make_unreadable(shard: Path, scene: Scene) -> None:
    (scene.marks / "unreadable").write_text(str(shard))


def _unreadable_hook(scene: Scene) -> Sabotage:
    """Return a hook that makes reading the damaged file fail. In a start before the damage there is no such file."""
    path = scene.marks / "unreadable"
    return fail_files(scene.marks / "failed", errno.EIO, "r", lambda name: path.exists() and name == path.read_text())


def _fill_disk(scene: Scene) -> Iterator[None]:
    """Fill the disk, completely or so far that no checkpoint fits, until a save has failed."""
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
    """Return a fault that a hook causes, and that is noticed by the hook's mark."""

    def strike(scene: Scene) -> Iterator[None]:
        mark = scene.marks / name
        yield from until(mark.exists)
        scene.strike()
        if where := mark.read_text():
            scene.notes.append(where)
        if then is not None:
            yield from then(scene)

    return strike


def _kill_later(scene: Scene) -> Iterator[None]:
    """Kill all ranks some steps after a skip: the skipped step must still be known after the restart."""
    assert scene.blow is not None
    yield from scene.moment(scene.blow.reached, min(scene.blow.reached + 2 * CHECKPOINT_INTERVAL, NUM_STEPS - 4))
    scene.strike()
    scene.signal(signal.SIGKILL, _ALL)


def nan_hook(scene: Scene, *, once: bool) -> Sabotage:
    """Return a hook that puts a NaN into a gradient. A NaN that stays is at the step that was chosen for the layout, at which the run that
    is compared with this one has it too."""
    step = scene.random.randint(1, NUM_STEPS - 6) if once else scene.nan_step
    victim, parameter = scene.random.choice(_ALL), scene.random.randrange(1000)
    scene.notes.append(f"in parameter {parameter} of rank {victim} at step {step}")
    return nan_in_gradient(scene.marks / "nan", victim=victim, step=step, parameter=parameter, once=once)


def _hang_hook(scene: Scene) -> Sabotage:
    step, number, victim = scene.random.randint(1, NUM_STEPS - 6), scene.random.randint(1, 20), scene.random.choice(_ALL)
    scene.notes.append(f"rank {victim} before collective {number} after the start of step {step}")
    scene.evidence = _who_hangs(victim, "(is behind|is missing)")
    return hang_before_collective(scene.marks / "hang", victim=victim, step=step, number=number)


def _kill_others(scene: Scene) -> Iterator[None]:
    """Kill all ranks, or none, so that the others have to notice that a rank has killed itself."""
    yield
    scene.signal(signal.SIGKILL, scene.random.choice([_ALL, []]))


def _change_hook(word: Callable[[Scene], str], num_changes: Sequence[int], num_groups: int = 1) -> Callable[[Scene], Sabotage]:
    """Return a hook that makes a rank kill itself before one of the changes of files whose path has the word. Rank r makes
    ``num_changes[r]`` such changes; rank 0 makes them in each of ``num_groups`` groups."""

    def hook(scene: Scene) -> Sabotage:
        number = scene.random.randint(1, sum(num_changes))
        victim = next(rank for rank in _ALL if number <= sum(num_changes[: rank + 1]))
        number -= sum(num_changes[:victim])
        group = scene.random.randrange(num_groups) if victim == 0 else 0
        scene.notes.append(f"rank {victim}, change {number}")
        return kill_at_change(scene.marks / "killed", victim=victim, word=word(scene), number=number, group=group)

    return hook


def _removed(scene: Scene) -> str:
    """Return the name under which one of the old checkpoints is removed."""
    return f"removing-step_{scene.random.choice([1, 2, 3]) * CHECKPOINT_INTERVAL:010d}"


def _phase_end_hook(scene: Scene) -> Sabotage:
    number, after_it = scene.random.randint(1, NUM_PHASES), scene.random.random() < 0.5
    return kill_at_phase_end(scene.marks / "killed", victim=scene.random.choice(_ALL), number=number, after=after_it)


def _full_at_manifest_hook(scene: Scene) -> Sabotage:
    step = scene.random.randrange(CHECKPOINT_INTERVAL, NUM_STEPS + 1, CHECKPOINT_INTERVAL)
    mark, name = scene.marks / "failed", f"step_{step:010d}/manifest.json"
    scene.notes.append(f"at step {step}")
    return fail_files(mark, errno.ENOSPC, "w", lambda path: name in path and not mark.exists())


def _slow_hook(scene: Scene) -> Sabotage:
    """Return a hook that makes a file slow for longer than health.hang_timeout, while its bytes keep moving."""
    victim, step = scene.random.choice(_ALL), scene.random.randrange(CHECKPOINT_INTERVAL, NUM_STEPS + 1, CHECKPOINT_INTERVAL)
    scene.notes.append(f"of rank {victim} at step {step}")
    name = f"step_{step:010d}/rank_{victim:05d}.shards"
    return slow_file(scene.marks / "slow", victim=victim, name=name, seconds=HANG_SECONDS + 2.0)


def _clock_hook(scene: Scene) -> Sabotage:
    """Return a hook that sets the clock of one rank or of all ranks, backwards or forwards."""
    victims, seconds = scene.random.choice([_ALL, [0], [1]]), scene.random.choice([-3600.0, 86400.0])
    step = scene.random.randint(1, NUM_STEPS - 6)
    scene.notes.append(f"of ranks {victims} by {seconds:.0f} s at step {step}")
    return shift_clock(scene.marks / "shifted", victims=victims, step=step, seconds=seconds)


def _kill_worker(scene: Scene) -> Iterator[None]:
    """Kill a worker process that reads data ahead, as the kernel does when memory is short."""

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

_DAMAGED = r"is damaged and is now damaged-step_\d+; training resumes from step"

FAULTS = [
    Fault(name="kill", title="SIGKILL of one rank", strike=_kill_one),
    Fault(name="kill-all", title="SIGKILL of all ranks", strike=_kill_all),
    Fault(name="kill-twice", title="SIGKILL of all ranks, and again", strike=_kill_twice, max_restarts=2),
    Fault(name="layout", title="SIGKILL of one rank, another layout", strike=_kill_and_change_layout, changes_layout=True),
    Fault(name="freeze", title="SIGSTOP of one rank", strike=_freeze, is_hang=True),
    Fault(name="thaw", title="SIGSTOP and SIGCONT", strike=_freeze_and_thaw, max_restarts=0),
    Fault(name="term", title="SIGTERM", strike=_ask_to_stop(signal.SIGTERM), statuses=_STOPPED),
    Fault(name="usr1", title="SIGUSR1", strike=_ask_to_stop(signal.SIGUSR1), statuses=_STOPPED),
    Fault(name="save", title="SIGKILL during a save", strike=_kill_in_save),
    Fault(
        name="first-save",
        title="SIGKILL during the first save",
        strike=_marked("killed", _kill_others),
        hook=_change_hook(lambda scene: f".writing-step_{CHECKPOINT_INTERVAL:010d}", (14, 3)),
    ),
    Fault(
        name="removal",
        title="SIGKILL while an old checkpoint is removed",
        strike=_marked("killed", _kill_others),
        hook=_change_hook(_removed, (8, 0)),
    ),
    Fault(
        name="average",
        title="SIGKILL while checkpoints are averaged",
        strike=_marked("killed", _kill_others),
        hook=_change_hook(lambda scene: ".writing-average_", (9, NUM_PHASES), num_groups=NUM_PHASES),
        phases=True,
    ),
    Fault(
        name="phase",
        title="SIGKILL at a phase's end",
        strike=_marked("killed", _kill_others),
        hook=_phase_end_hook,
        phases=True,
    ),
    Fault(name="truncate", title="a truncated shard", strike=_damage(_truncate), evidence=_DAMAGED),
    Fault(name="flip", title="a flipped bit in a shard", strike=_damage(_flip_bit), evidence=_DAMAGED),
    Fault(
        name="unreadable",
        title="EIO in a shard",
        strike=_damage(_make_unreadable),
        hook=_unreadable_hook,
        evidence=_DAMAGED,
    ),
    Fault(name="disk", title="a full disk", strike=_fill_disk, small_disk=True, evidence="could not save|No space left|File too large"),
    Fault(
        name="manifest",
        title="ENOSPC at the manifest",
        strike=_marked("failed"),
        hook=_full_at_manifest_hook,
        evidence=r"could not save .*disk full",
    ),
    Fault(
        name="slow",
        title="a save slower than a hang",
        strike=_marked("slow"),
        hook=_slow_hook,
        is_hang=True,
        max_restarts=0,
    ),
    Fault(
        name="clock",
        title="a clock that jumps, then SIGKILL",
        strike=_marked("shifted", _kill_later),
        hook=_clock_hook,
    ),
    Fault(
        name="nan", title="NaN in a gradient, once", strike=_marked("nan"), hook=lambda scene: nan_hook(scene, once=True), max_restarts=0
    ),
    Fault(
        name="nan-again",
        title="NaN in a gradient, persistent, then SIGKILL",
        strike=_marked("nan", _kill_later),
        hook=lambda scene: nan_hook(scene, once=False),
        skips=True,
        evidence=r"step \d+ is skipped",
    ),
    Fault(
        name="worker",
        title="SIGKILL of a data worker",
        strike=_kill_worker,
        overrides=("data.workers=process",),
        evidence="data worker .* died",
    ),
    Fault(name="hang", title="a hung collective", strike=_marked("hang"), hook=_hang_hook, is_hang=True),
    Fault(
        name="storage-fails",
        title="failing storage, and the disk is lost",
        strike=fail,
        hook=upload_hook,
        uploads=True,
        evidence="fetching the checkpoint of step",
    ),
    Fault(
        name="storage-lies",
        title="lying storage, and the disk is lost",
        strike=lie,
        hook=upload_hook,
        uploads=True,
        max_restarts=2,
        evidence="fetching the checkpoint of step",
    ),
    Fault(name="torchrun", title="SIGKILL of one rank under torchrun", strike=_kill_one, torchrun=True),
]
