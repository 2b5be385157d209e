"""A small run: joins the other processes, adds up across them, counts steps, saves its count and stops when asked.

python tests/launch/probe.py FOLDER: the first time it counts until it is stopped, then three steps more. Each process
writes FOLDER/processI.json; FOLDER/saved is the count.
"""

import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.errors import AGAIN
from rlaif_jax.parallel import processes


def main(folder: Path) -> int:
    processes.start(processes.place_from({}, os.environ))
    with processes.heeding_sigterm():
        saved = folder / "saved"
        began_at = processes.agree(lambda: int(saved.read_text()) if saved.exists() else 0)
        report = {"index": processes.index(), "count": processes.count(), "devices": jax.device_count()}
        report |= {"sum": added_up(), "began_at": began_at, "pid": os.getpid()}
        path = folder / f"process{processes.index()}.json"
        path.with_suffix(".tmp").write_text(json.dumps(report))
        path.with_suffix(".tmp").rename(path)
        step = began_at
        while not began_at or step < began_at + 3:
            if processes.stop_point():
                save(saved, step)
                return AGAIN
            time.sleep(0.05)
            step += 1
        save(saved, step)
        return 0


def added_up() -> int:
    """The sum of all processes' indices, by a program over the devices of all."""
    devices = np.array(jax.devices())
    sharding = NamedSharding(jax.sharding.Mesh(devices, "x"), PartitionSpec("x"))
    mine = np.full(jax.local_device_count(), jax.process_index())
    return int(jax.jit(jnp.sum)(jax.make_array_from_process_local_data(sharding, mine)))


def save(path: Path, step: int) -> None:
    if processes.first():
        path.write_text(str(step))
    processes.barrier()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
