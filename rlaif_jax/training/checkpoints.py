"""Orbax checkpoints of a stage, each file with a checksum of ours: Orbax does not notice flipped bytes.

`STEP/` is Orbax's: the parameters, and apart from them the rest of the state, by every process what its devices hold.
`checksums/STEP.json` is written once Orbax has finished the step: a checkpoint without it is one that a kill cut short,
and counts for nothing. Of several processes each hashes a part of the files, and checks a part.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from rlaif_jax.errors import UserError
from rlaif_jax.files import file_hashes, write_alone
from rlaif_jax.parallel import processes
from rlaif_jax.progress import warn

State = TypeVar("State")
_KEEP = 2  # the newest, and the one to fall back on
_OVERHEAD = 1 << 20  # bytes: room for Orbax's metadata and half-filled blocks
_SAVES = itertools.count()
_TEMPORARY = "orbax-checkpoint-tmp"  # in the name of each folder that Orbax has not finished


class Checkpoints:
    """The checkpoints of one stage, for the loop that writes them: the newest two, the best by a metric, every nth.

    A state is any dataclass pytree with a field `params`; other stages read that item alone.
    """

    def __init__(self, folder: epath.Path, keep_best: str = "", keep_every: int = 0):
        """keep_best: "", or "min METRIC" or "max METRIC"; keep_every: of whose multiples every one is kept, or 0."""
        self.folder, self._keep_best, self._keep_every = _absolute(folder), keep_best, keep_every
        self._finisher, self._pending = ThreadPoolExecutor(1), None  # of the save under way

    def resume(self, abstract: State) -> tuple[int, State] | None:
        """Step and state of the newest whole checkpoint, on the shardings of `abstract`; None where there is none.

        Newer ones are deleted, since Orbax saves nothing before its last step; a damaged one is reported on stderr.
        Raises UserError where all are damaged, and where the state does not fit.
        """
        self._sweep()
        steps, cut_short = processes.agree(lambda: _steps_and_unfinished(self.folder))
        finished = [step for step in steps if step not in cut_short]
        damaged: dict[int, str] = {}
        for step in reversed(finished):
            if not (reason := damage(self.folder, step)):
                break
            damaged[step] = reason
        if finished and len(damaged) == len(finished):
            newest = f"step {finished[-1]} {damaged[finished[-1]]}"
            raise UserError(
                f"no whole checkpoint in {self.folder}: {newest}. Restore the folder from a copy, or delete it to "
                f"train the stage from its start"
            )
        for bad, reason in damaged.items():
            warn(f"deleted checkpoint {self.folder}/{bad}, which {reason}")

        def delete() -> None:
            for bad in (*cut_short, *damaged):
                (self.folder / str(bad)).rmtree()
            self._prune()

        processes.agree(delete)
        if not finished:
            return None
        step = finished[-1 - len(damaged)]
        items = {"params": abstract.params, "rest": _rest(abstract)}
        restored = {name: _restore(self.folder / str(step) / name, item) for name, item in items.items()}
        return step, dataclasses.replace(abstract, params=restored["params"], **restored["rest"])

    def save(self, step: int, state, metrics: Mapping[str, float | None], planned: bool = True) -> None:
        """Begins to write a checkpoint, once the one before is finished; it counts only once its checksums are there.

        metrics: of the step just done. planned: False for one that SIGTERM made, which is never the best: that would
        depend on when it came.
        """
        self._finish()
        items = {"params": ocp.args.StandardSave(state.params), "rest": ocp.args.StandardSave(_rest(state))}
        manager = self._manager
        _check_room(self.folder, state)
        with self._swept():
            saved = manager.save(step, args=ocp.args.Composite(**items), metrics=self._ranked(metrics, planned))
        if not saved:
            raise RuntimeError(f"Orbax did not save step {step} in {self.folder}, which has {_steps(self.folder)}")
        name = f"checksums/{next(_SAVES)}"  # the same in all processes
        self._pending: Future | None = self._finisher.submit(self._write_checksums, step, name)

    def _write_checksums(self, step: int, name: str) -> None:
        """Waits for Orbax, in a thread of its own."""
        with self._swept():
            self._manager.wait_until_finished()
        names = processes.agree(lambda: _files(self.folder / str(step)), f"{name}/files")
        mine = names[processes.index() :: processes.count()]
        hashes = file_hashes([self.folder / str(step) / name for name in mine])
        parts = processes.gather(dict(zip(mine, hashes, strict=True)), f"{name}/parts")
        if processes.first():
            found = {name: digest for part in parts for name, digest in part.items()}
            write_alone(_manifest(self.folder, step), json.dumps(found, indent=2, sort_keys=True) + "\n")
            self._prune()

    def _finish(self) -> None:
        """Waits for the save under way. Raises what has gone wrong in it."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    @contextlib.contextmanager
    def _swept(self) -> Iterator[None]:
        """Sweeps after a failure: half a checkpoint would take room from whoever runs out of it."""
        try:
            yield
        except BaseException:
            self._sweep()
            raise

    def _ranked(self, metrics: Mapping[str, float | None], planned: bool) -> dict[str, float]:
        """Metrics to choose the best by; one that a step has not got is the worst."""
        worst = math.inf if self._keep_best.startswith("min") else -math.inf
        return {name: worst if value is None or not planned else value for name, value in metrics.items()}

    def close(self) -> None:
        """Waits for the save under way, and releases the threads."""
        try:
            self._finish()
        finally:
            self._finisher.shutdown()
            if "_manager" in self.__dict__:
                self._manager.close()

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Made at the first save: it reads what is there, damaged or not, and says so on stderr.
        kept: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(n=_KEEP)]
        options = {}
        if self._keep_every:
            kept.append(checkpoint_managers.EveryNSteps(interval_steps=self._keep_every))
        if self._keep_best:
            mode, metric = self._keep_best.split()
            best = checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[metric],
                reverse=mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
            # Without best_fn Orbax does not write the metrics down, and forgets them with the process.
            options = {"best_fn": lambda metrics: metrics[metric], "best_mode": mode}
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=True,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
                **options,
            ),
        )

    def _sweep(self) -> None:
        """Deletes what unfinished saves have left."""
        if processes.first() and self.folder.exists():
            for path in self.folder.iterdir():
                if _TEMPORARY in path.name:
                    path.rmtree()

    def _prune(self) -> None:
        """Deletes the checksums of checkpoints that are gone."""
        steps, folder = _steps(self.folder), self.folder / "checksums"
        for path in folder.iterdir() if folder.exists() else ():
            if path.name not in {f"{step}.json" for step in steps}:
                path.unlink()


def restore_params(folder: epath.Path, step: int, abstract):
    """The parameters alone of one checkpoint in `folder`, on the shardings of `abstract`.

    Raises UserError where that checkpoint is missing or damaged, whatever others there are.
    """
    folder = _absolute(folder)
    check_whole(folder, step)
    return _restore(folder / str(step) / "params", abstract)


def check_whole(folder: epath.Path, step: int) -> None:
    """Raises UserError where a checkpoint in `folder` is missing or damaged."""
    if not (folder / str(step)).exists():
        raise UserError(f"no checkpoint {folder}/{step}")
    if reason := damage(folder, step):
        raise UserError(f"checkpoint {folder}/{step} {reason}")


def _absolute(folder: epath.Path) -> epath.Path:
    return folder if folder.is_absolute() else folder.absolute()  # Orbax wants it, and it would break gs:// ones


def _rest(state) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}


def _steps(folder: epath.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def _steps_and_unfinished(folder: epath.Path) -> tuple[list[int], list[int]]:
    """The steps that are there, and the last of them where it is not finished."""
    steps = _steps(folder)
    return steps, [step for step in steps[-1:] if not _manifest(folder, step).exists()]


def _manifest(folder: epath.Path, step: int) -> epath.Path:
    return folder / "checksums" / f"{step}.json"


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    """The paths of all files below `folder`, relative to it."""
    names = []
    for path in sorted(folder.iterdir()):
        names += _files(path, f"{prefix}{path.name}/") if path.is_dir() else [prefix + path.name]
    return names


def _check_room(folder: epath.Path, state) -> None:
    """Raises OSError where the disk has no room for this host's part of `state`.

    Before Orbax begins: when it runs out of room itself, its threads fill stderr with tracebacks.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # a bucket
        return
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards if shard.replica_id == 0]
    needed = sum(shard.data.nbytes for shard in shards) + _OVERHEAD
    if free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder}: a checkpoint needs {needed} bytes")


def damage(folder: epath.Path, step: int) -> str:
    """What is wrong with a checkpoint's bytes, as "has ..."; "" where every file is as it was written."""
    hashes, reason = processes.agree(lambda: _checksums(folder, step))
    if reason:
        return reason
    mine = list(hashes)[processes.index() :: processes.count()]
    found = zip(mine, file_hashes([folder / str(step) / name for name in mine]), strict=True)
    bad = processes.gather([name for name, new in found if new != hashes[name]])
    changed = [name for part in bad for name in part]
    return f"has other bytes in {changed[0]} than were written" if changed else ""


def _checksums(folder: epath.Path, step: int) -> tuple[dict[str, str], str]:
    """The checksum of each file of a checkpoint, all of them there, or what is wrong."""
    manifest = _manifest(folder, step)
    if not manifest.exists():
        return {}, f"has no checksums in {manifest.parent}"
    try:
        hashes = dict(json.loads(manifest.read_text()))
    except ValueError:
        return {}, f"has unreadable checksums in {manifest}"
    missing = sorted(hashes.keys() - set(_files(folder / str(step))))
    return hashes, f"has lost {missing[0]}" if missing else ""


def _restore(path: epath.Path, abstract):
    """An item of a checkpoint. Raises UserError that names the first array which does not fit `abstract`."""
    handler = ocp.StandardCheckpointHandler()
    found, expected = _arrays(handler.metadata(path).tree), _arrays(abstract)
    # Before Orbax reads: it casts other dtypes silently, and its failures leave asyncio's complaints on stderr.
    wrong = [name for name in expected | found if found.get(name) != expected.get(name)]
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        raise UserError(
            f"checkpoint {path} can't be restored: {name} is {found.get(name, 'missing')} there, and the config wants "
            f"{expected.get(name, 'nothing')}{more}. Use the config that it was saved with, or another --workdir"
        )
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))


def _arrays(tree: Any) -> dict[str, str]:
    """Dtype and shape of each array by its path. Orbax makes dicts and lists of other containers: names alone count."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
