"""Orbax checkpoints of a stage: the parameters and, apart from them, the rest of the state."""

import dataclasses
from typing import TypeVar

import orbax.checkpoint as ocp
from etils import epath

from rlaif_jax.errors import UserError

State = TypeVar("State")


def _rest(state) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}


class Checkpoints:
    """The checkpoints of one stage, the newest `keep` of them.

    A state is any dataclass pytree with a field `params`; other stages read that item alone.
    """

    def __init__(self, folder: epath.Path, keep: int = 2):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        if not folder.is_absolute():  # Orbax refuses relative paths, and absolute() would break gs:// ones
            folder = folder.absolute()
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state) -> None:
        """Writes a checkpoint; it counts only once it is whole."""
        items = ocp.args.Composite(params=ocp.args.StandardSave(state.params), rest=ocp.args.StandardSave(_rest(state)))
        self._manager.save(step, args=items)
        self._manager.wait_until_finished()

    def restore(self, abstract: State) -> State:
        """The newest state, on the shardings of `abstract`. Raises UserError where it does not fit."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params), rest=ocp.args.StandardRestore(_rest(abstract))
        )
        restored = self._restore(items)
        return dataclasses.replace(abstract, params=restored["params"], **restored["rest"])

    def restore_params(self, abstract):
        """The newest parameters alone, on the shardings of `abstract`."""
        return self._restore(ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))["params"]

    def _restore(self, items):
        step = self.latest_step()
        if step is None:
            raise UserError(f"no checkpoint in {self.folder}: run the stage that writes it first")
        try:
            return self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"checkpoint {self.folder}/{step} can't be restored: {reason}") from error

    def close(self) -> None:
        """Releases the manager's threads."""
        self._manager.close()
