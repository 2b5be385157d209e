"""Atomic files: a reader sees the old content or the new, never a part."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from etils import epath

from rlaif_jax.errors import UserError


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


def read_json(path: epath.Path):
    """Reads a JSON file. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the stage that writes it") from error


def read_json_lines(path: epath.Path) -> list[dict]:
    """Reads a file of one JSON object a line. Raises UserError where it is damaged."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # a kill can leave half a line at the end, which was never written
            break
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"line {number} of {path} is damaged: delete that line") from error
    return rows


def read_parquet(path: epath.Path) -> pa.Table:
    """Reads a Parquet file. Raises UserError where it is damaged."""
    try:
        with path.open("rb") as file:
            return pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}): delete it and run the stage that writes it") from error


def file_hash(path: epath.Path, chunk: int = 1 << 24) -> str:
    """xxh3 of a file's bytes, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while data := file.read(chunk):
            digest.update(data)
    return digest.hexdigest()
