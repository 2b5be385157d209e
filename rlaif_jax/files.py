"""Atomic files: a reader sees the old content or the new, never a part."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """Replaces a text file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: epath.Path, value) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_parquet(path: epath.Path, table: pa.Table) -> None:
    """Replaces a Parquet file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.tmp"
    with temporary.open("wb") as file:
        pq.write_table(table, file)
    temporary.replace(path)


def read_parquet(path: epath.Path) -> pa.Table:
    """Reads a Parquet file."""
    with path.open("rb") as file:
        return pq.read_table(file)
