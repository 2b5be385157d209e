"""Runs of the command as processes, killed at seeded random moments, and the comparison of what they leave."""

import dataclasses
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
from etils import epath

from rlaif_jax.errors import AGAIN
from rlaif_jax.training.checkpoints import damage
from tests.helpers import start_main

STAGES = ("sft", "critique", "sl_cai", "label", "reward_model", "rl", "eval")  # of constitutional AI
TRACES_GONE = {"critique": 12}  # shards that a stage makes and does not leave


@dataclasses.dataclass(frozen=True)
class Kill:
    """A moment: `delay` seconds after `stage` has begun and left `events` traces (see `_events`)."""

    stage: str
    events: int
    delay: float
    signal: signal.Signals


@dataclasses.dataclass(frozen=True)
class Command:
    """The command with its flags but for --workdir; its processes share one compilation cache."""

    flags: list[str]
    cache: Path

    def start(self, workdir, *more: str, devices: int = 1) -> subprocess.Popen:
        own = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_COMPILATION_CACHE_DIR": str(self.cache)}
        return start_main([*self.flags, f"--workdir={workdir}", *more], own)

    def start_several(self, workdir, count: int, devices: int, *more: str, own=()) -> list[subprocess.Popen]:
        """So many processes of one run, each with so many devices. own: the flags that each has for itself."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [f"--coordinator={address}", f"--processes={count}"] if count > 1 else []
        numbers = [[f"--process={i}"] if flags else [] for i in range(count)]
        return [
            self.start(workdir, *flags, *number, *more, *(own[i] if own else []), devices=devices)
            for i, number in enumerate(numbers)
        ]

    def run(self, workdir, *more: str, count: int = 1, devices: int = 1) -> tuple[int, str]:
        """Exit status and stderr, which are those of the first of several processes."""
        return ended(self.start_several(workdir, count, devices, *more))[0]


def ended(processes: list[subprocess.Popen], timeout: float | None = None) -> list[tuple[int, str]]:
    """Exit status and stderr of each, once all have ended; TimeoutExpired where that takes longer than `timeout`."""
    with ThreadPoolExecutor(len(processes)) as pool:
        errors = list(pool.map(lambda process: process.communicate(timeout=timeout)[1], processes))
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def draw_kills(undisturbed: Path, number: int, seed: int) -> list[Kill]:
    """`number` moments over a whole run, in order: as many in each stage, and one in each at least."""
    rng, names = np.random.default_rng(seed), list(STAGES)
    kills = []
    for i, stage in enumerate(names):
        count = max(1, len(range(i, number, len(names))))
        left = _events(undisturbed / stage) + TRACES_GONE.get(stage, 0)
        events = max(left - 1, count)  # the last trace may be the end of the stage
        for event in sorted(rng.choice(events, count, replace=False).tolist()):
            with_signal = signal.SIGKILL if rng.random() < 0.7 else signal.SIGTERM
            kills.append(Kill(stage, event, float(rng.uniform(0, 0.15)), with_signal))
    return kills


def survive(command: Command, workdir: Path, kills: list[Kill]) -> None:
    """Runs the same command again and again, killed once each time, and then to its end."""
    for kill in kills:
        began = time.time_ns()
        process = command.start(workdir)
        target = list(STAGES).index(kill.stage), kill.events
        while position(workdir, began) < target:
            assert process.poll() is None, f"{kill}: {process.communicate()[1]}"
            time.sleep(0.002)
        time.sleep(kill.delay)
        process.send_signal(kill.signal)
        error = process.communicate(timeout=60)[1]
        expected = AGAIN if kill.signal == signal.SIGTERM else -kill.signal
        assert process.returncode == expected, f"{kill} came too late: exit status {process.returncode}"
        assert ("SIGTERM to the process: all is saved" in error) == (kill.signal == signal.SIGTERM), error
    status, error = command.run(workdir)
    assert status == 0, error


def position(workdir: Path, began: int, stages=STAGES) -> tuple[int, int]:
    """The number of the stage that a process started at `began` works on, and the stage's traces."""
    for i, stage in reversed(list(enumerate(stages))):
        record = workdir / stage / "stage.json"
        if record.exists() and record.stat().st_mtime_ns > began:
            return i, _events(workdir / stage)
    return -1, 0


def _events(folder: Path) -> int:
    """Traces of progress in a stage's folder: logged steps, checkpoints and shards."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    checkpoints = folder.glob("checkpoints/checksums/*.json")
    return lines + len([*folder.glob("*.parquet"), *folder.glob("*/*.parquet"), *checkpoints])


def assert_same(one: Path, other: Path) -> None:
    """Every file of two runs holds the same, bit for bit, but for the clock's."""
    assert _files(one) == _files(other)
    for name in _files(one):
        if name.endswith(".parquet"):
            assert pq.read_table(one / name).equals(pq.read_table(other / name)), name
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert _checkpoints(one) == _checkpoints(other)
    for name in _checkpoints(one):
        jax.tree.map(np.testing.assert_array_equal, _arrays(one / name), _arrays(other / name))


def _files(workdir: Path) -> list[str]:
    names = [path.relative_to(workdir) for path in sorted(workdir.rglob("*")) if path.is_file()]
    # The report shows the folder's name, and is made from the other files.
    clock = {"checkpoints", "logs", "report.html"}
    return [str(name) for name in names if not clock & set(name.parts) and not name.match("timing*")]


def _checkpoints(workdir: Path) -> list[str]:
    """The folder of each stage's last checkpoint; all are whole. What SIGTERM has saved may be among the earlier."""
    steps = [path for path in workdir.glob("*/checkpoints/*") if path.name.isdigit()]
    for step in steps:
        assert not damage(epath.Path(step.parent), int(step.name)), step
    last = {step.parent: step for step in sorted(steps, key=lambda step: int(step.name))}
    return sorted(str(step.relative_to(workdir)) for step in last.values())


def _arrays(checkpoint: Path):
    """Parameters, optimizer state and what else there is, wherever it was saved."""
    handler, here = ocp.StandardCheckpointHandler(), jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(path: epath.Path):
        leaf = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
        return handler.restore(path, args=ocp.args.StandardRestore(jax.tree.map(leaf, handler.metadata(path).tree)))

    return {item: read(epath.Path(checkpoint / item)) for item in ("params", "rest")}
