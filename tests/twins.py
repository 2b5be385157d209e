"""The comparison of two runs that did the same on other devices: alike but for rounding."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

_CLOCK = {"checkpoints", "logs", "report.html", "config.json", "audit.html"}


def assert_alike(one: Path, other: Path, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Every file of two runs holds the same, numbers within rounding; texts exactly."""
    assert files(one) == files(other)
    for name in files(one):
        _assert_close(_read(one / name), _read(other / name), name, rtol, atol)


def files(workdir: Path) -> list[str]:
    """The files of a run that hold no clock; a shard goes by its number, for its name has a checksum."""
    names = (path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())
    left_out = lambda name: _CLOCK & set(name.parts) or "shards" in name.parts or name.match("timing*")  # noqa: E731
    return sorted(str(name) for name in names if not left_out(name))


def _read(path: Path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def _assert_close(one, other, where: str, rtol: float, atol: float) -> None:
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"shards", "judge_hash"}:
            _assert_close(one[key], other[key], f"{where}/{key}", rtol, atol)
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            _assert_close(*pair, f"{where}/{i}", rtol, atol)
    elif isinstance(one, float) and isinstance(other, float):
        np.testing.assert_allclose(one, other, rtol, atol, err_msg=where)
    else:
        assert one == other, where
