"""Atomic files: a reader sees the old content or the new, never a part. And their checksums.

Of several processes, which share a disk or bucket, all call `write_text`, `write_json` and `write_parquet`, the first
one writes, and all go on once the file is there. `write_alone` and `write_checked_parquet` are for one by itself.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.parallel import processes


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[epath.Path]:
    """A file to write, which takes the place of `path` at the end and is gone after a failure.

    Raises UserError where it can't be written.
    """
    # Others, on this machine or another one, may write the same file at the same time.
    temporary = path.parent / f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # half a file would take room from whoever runs out of it
            raise
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(path: epath.Path) -> Iterator[epath.Path]:
    """A folder to fill, which is called `path` at the end and is gone after a failure; of all processes, the first one
    makes it. After a kill it is `path`.tmp, which the next call deletes.

    Raises UserError where there is something at `path`, and where it can't be written.
    """
    temporary = path.parent / f"{path.name}.tmp"

    def begin() -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is there already: name another folder, or delete it")
        temporary.rmtree(missing_ok=True)
        temporary.mkdir(parents=True)

    def end() -> None:
        temporary.replace(path)

    try:
        processes.agree(begin)
        try:
            yield temporary
            processes.agree(end)
        except BaseException:
            if processes.first():
                temporary.rmtree(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from error


def there(path: epath.Path) -> bool:
    """Whether a file is there, as the first process sees it: all do the same about it."""
    return processes.agree(path.exists)


def remove_leftovers(folder: epath.Path) -> None:
    """Deletes what a killed process was writing in `folder` and the folders in it, where nobody else is writing."""

    def remove() -> None:
        for pattern in ("*.tmp", "*/*.tmp"):
            for path in folder.glob(pattern):
                path.unlink()

    processes.agree(remove)


def remove_folder(folder: epath.Path) -> None:
    """Deletes a folder, if it is there."""
    processes.agree(lambda: folder.rmtree(missing_ok=True))


def write_text(path: epath.Path, text: str) -> None:
    """Replaces a text file in one step."""
    processes.agree(lambda: write_alone(path, text))


def write_alone(path: epath.Path, text: str) -> None:
    """As `write_text`, for one process that writes what no other one waits for."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: epath.Path, value) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_parquet(path: epath.Path, table: pa.Table) -> None:
    """Replaces a Parquet file in one step."""

    def write() -> None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            pq.write_table(table, file)

    processes.agree(write)


def write_checked_parquet(folder: epath.Path, stem: str, table: pa.Table) -> epath.Path:
    """Writes `folder`/`stem`.HASH.parquet, HASH being the xxh3 of its bytes: file and checksum appear in one step."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    path = folder / f"{stem}.{xxhash.xxh3_64_hexdigest(data)}.parquet"
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def shard_names(folder: epath.Path) -> list[str]:
    """The names of what `write_checked_parquet` wrote into `folder`, in order."""
    return sorted(path.name for path in folder.glob("*.*.parquet"))


def read_shards(
    folder: epath.Path, remedy: str, names: Sequence[str] | None = None, window: int = 8
) -> Iterator[tuple[epath.Path, pa.Table]]:
    """The shards of these names in `folder`, by default all, in this order, `window` read at a time.

    Raises UserError where the bytes of one are not those that were written. `remedy`: what deleting it leads to.
    """
    paths = [folder / name for name in (shard_names(folder) if names is None else names)]
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), window):
            some = paths[start : start + window]
            yield from zip(some, pool.map(lambda path: read_shard(path, remedy), some), strict=True)


def read_shard(path: epath.Path, remedy: str) -> pa.Table:
    """One of them."""
    data = path.read_bytes()
    if xxhash.xxh3_64_hexdigest(data) != path.name.split(".")[-2]:
        raise UserError(f"{path} is damaged: its bytes are not those that were written. Delete that file, and {remedy}")
    return pq.read_table(pa.BufferReader(data))


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


def file_hashes(paths: Sequence[epath.Path]) -> list[str]:
    """`file_hash` of each path, read in parallel (xxh3 lets other threads run)."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(file_hash, paths))
