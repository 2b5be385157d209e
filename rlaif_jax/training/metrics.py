"""metrics.jsonl (reproducible), timing.jsonl (wall clock), samples.jsonl and TensorBoard files of a stage."""

import contextlib
import json
import time

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from rlaif_jax.errors import UserError
from rlaif_jax.files import write_alone

_FLUSH_SECONDS = 60  # a cloud bucket gets the whole event file at each flush


class JsonLines:
    """An append-only file of JSON objects with a `step`; `resume` drops what a checkpoint does not cover."""

    def __init__(self, path: epath.Path, resume_step: int):
        self.path = path
        kept = []
        if path.exists():
            # A kill can leave half a line at the end: what does not end with a newline was never written.
            lines = path.read_text().splitlines(keepends=True)
            whole = [(number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]
            kept = [line for number, line in whole if self._step(number, line) < resume_step]
        write_alone(path, "".join(kept))
        self._file = path.open("a")

    def _step(self, number: int, line: str) -> int:
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"line {number} of {self.path} is damaged: delete that line") from error

    def write(self, row: dict) -> None:
        """Appends one object and flushes it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Board:
    """Scalars for TensorBoard, which hides what another process logged from `resume_step` on.

    Written here and now: tensorboardX's SummaryWriter leaves it to a thread, whose death on a full disk blocks the
    next scalars for ever.
    """

    def __init__(self, folder: epath.Path, resume_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        self._write(Event(step=resume_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """The metrics of a step, but for those that are None."""
        for name, value in values.items():
            if value is None:
                continue
            self._write(Event(step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


class StageLog:
    """The log files of one stage, cut back to `resume_step`, the first step that will run."""

    def __init__(self, folder: epath.Path, logs: epath.Path, resume_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = JsonLines(folder / "metrics.jsonl", resume_step)
        self._timing = JsonLines(folder / "timing.jsonl", resume_step)
        self._samples = JsonLines(folder / "samples.jsonl", resume_step)
        self._board = Board(logs / folder.name, resume_step)

    def write(self, step: int, metrics: dict[str, float], samples: list[dict], seconds: float) -> None:
        """A step: its metrics, finite or None and `tokens` among them, sampled texts, and its wall-clock time."""
        metrics = dict(sorted(metrics.items()))
        self._metrics.write({"step": step} | metrics)
        self._board.scalars(step, metrics)
        for sample in samples:
            self._samples.write({"step": step} | sample)
        self._timing.write({"step": step, "time": seconds, "tokens_per_second": metrics["tokens"] / seconds})

    def close(self) -> None:
        """Closes all files, also those after one that fails."""
        with contextlib.ExitStack() as stack:
            for log in (self._metrics, self._timing, self._samples, self._board):
                stack.callback(log.close)
