"""metrics.jsonl (reproducible), timing.jsonl (wall clock), samples.jsonl and TensorBoard files of a stage."""

import json

from etils import epath
from tensorboardX import SummaryWriter

from rlaif_jax.errors import UserError
from rlaif_jax.files import write_text


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
        write_text(path, "".join(kept))
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


class StageLog:
    """The log files of one stage, cut back to `resume_step`, the first step that will run."""

    def __init__(self, folder: epath.Path, logs: epath.Path, resume_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = JsonLines(folder / "metrics.jsonl", resume_step)
        self._timing = JsonLines(folder / "timing.jsonl", resume_step)
        self._samples = JsonLines(folder / "samples.jsonl", resume_step)
        self._board = SummaryWriter(str(logs / folder.name), purge_step=resume_step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics, all of them finite."""
        values = {name: float(value) for name, value in sorted(values.items())}
        self._metrics.write({"step": step} | values)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def timing(self, step: int, seconds: float, tokens: float) -> None:
        """One line of wall-clock time: seconds of the step, and tokens a second."""
        self._timing.write({"step": step, "time": seconds, "tokens_per_second": tokens / seconds})

    def sample(self, step: int, row: dict) -> None:
        """One sampled text with its scores."""
        self._samples.write({"step": step} | row)

    def close(self) -> None:
        """Closes all files."""
        for log in (self._metrics, self._timing, self._samples, self._board):
            log.close()
