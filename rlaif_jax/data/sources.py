"""Rows of text from where they lie: JSON lines, Parquet, Hugging Face datasets, TensorFlow Datasets."""

import contextlib
import dataclasses
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from rlaif_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where rows come from, and what their fields are called there."""

    kind: str  # "" for no rows, "embedded", "jsonl", "parquet", "datasets" or "tfds"
    # A file or a pattern (posts-*.jsonl.gz); datasets: OWNER/NAME[/FOLDER] on the hub, or a folder; tfds: its data_dir.
    path: str
    name: str  # datasets: the configuration, "" for the only one; tfds: the builder, and :VERSION if needed
    split: str  # of datasets and tfds; of files, the rows whose field `split` says so; "" for all
    # Our field -> theirs; dots reach into objects and lists: {"reply": "summaries.0.text"}.
    fields: Mapping[str, str]
    limit: int  # takes the first rows only, of several files one of each in turn; 0 takes all


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A row that can't be used, and why: a short reason that is the same for all rows of its sort."""

    reason: str


def read(config: SourceConfig, root: str) -> Iterator[dict[str, Any] | Malformed]:
    """The rows in their order, under our field names. `root` is the folder of relative paths.

    Raises UserError where the source as a whole can't be read.
    """
    reader = {"jsonl": _of_files, "parquet": _of_files, "datasets": _hugging_face, "tfds": _tensorflow_datasets}
    rows = reader[config.kind](config, root)
    if config.split and config.kind in ("jsonl", "parquet"):
        rows = (row for row in rows if not isinstance(row, Mapping) or row.get("split") == config.split)
    for row in itertools.islice(rows, config.limit or None):
        yield row if isinstance(row, Malformed) else _mapped(row, config.fields)


KINDS = ("", "embedded", "jsonl", "parquet", "datasets", "tfds")


def files(config: SourceConfig, root: str) -> list[epath.Path]:
    """The files of a source of kind jsonl or parquet. Raises UserError where there is none."""
    path = epath.Path(root) / config.path
    found = [file for file in sorted(path.parent.glob(path.name)) if file.is_file()]
    if not found:
        raise UserError(f"no data file at {path}: see config.data.root and the path of the source")
    return found


def _mapped(row: Any, fields: Mapping[str, str]) -> dict[str, Any] | Malformed:
    if not isinstance(row, Mapping):
        return Malformed("not an object")
    mapped = {}
    for ours, theirs in fields.items():
        value: Any = row
        for part in theirs.split("."):
            try:
                value = value[int(part)] if isinstance(value, (list, tuple)) else value[part]
            except (KeyError, IndexError, TypeError, ValueError):
                return Malformed(f"no field {theirs}")
        mapped[ours] = value
    return mapped


def _of_files(config: SourceConfig, root: str) -> Iterator[Any]:
    """The rows of all files, one file after another; with a limit one row of each in turn, so that none is left out."""
    of_a_file = {"jsonl": _json_lines, "parquet": _parquet}[config.kind]
    left = [of_a_file(path) for path in files(config, root)]
    if not config.limit:
        yield from itertools.chain(*left)
        return
    while left:
        for rows in list(left):
            try:
                yield next(rows)
            except StopIteration:
                left.remove(rows)


def _json_lines(path: epath.Path) -> Iterator[Any]:
    opened = gzip.open if path.name.endswith(".gz") else contextlib.nullcontext
    with path.open("rb") as raw, opened(raw) as lines:
        try:
            for line in lines:
                if line.strip():
                    yield _json_row(line)
        except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): fetch it again") from error


def _json_row(line: bytes) -> Any:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # a lone half of a pair of \\u escapes is no text
    except UnicodeError:
        return Malformed("not UTF-8")
    except (ValueError, RecursionError):
        return Malformed("not JSON")
    return row


def _parquet(path: epath.Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            for batch in pq.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): fetch it again") from error


def _hugging_face(config: SourceConfig, root: str) -> Iterator[Any]:
    import datasets  # slow to import, and needed for this kind alone

    folder = epath.Path(root) / config.path
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(folder))
            rows = loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            hub = "/".join(config.path.split("/")[:2])
            data_dir = "/".join(config.path.split("/")[2:]) or None
            path = str(folder) if folder.exists() else hub
            rows = datasets.load_dataset(path, config.name or None, data_dir=data_dir, split=config.split)
    except Exception as error:  # datasets passes on whatever hub, cache or file make it raise
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"the data set {config.path!r} (split {config.split!r}) can't be loaded: {reason}") from error
    yield from rows


def _tensorflow_datasets(config: SourceConfig, root: str) -> Iterator[Any]:
    import grain.python as grain
    import tensorflow_datasets as tfds

    from rlaif_jax.data import tfds_builders  # noqa: F401  (registers our builders)

    data_dir = str(epath.Path(root) / config.path)
    try:
        builder = tfds.builder(config.name, data_dir=data_dir, try_gcs=False)
        if not builder.data_path.exists():
            raise UserError(f"the TFDS set {config.name!r} is not prepared in {data_dir}")
        source = builder.as_data_source(config.split)
    except NotImplementedError as error:
        raise UserError(
            f"{config.name} in {data_dir} is stored as TFRecord, which needs TensorFlow: convert it once with "
            f"tfds convert_format --root_data_dir={data_dir} --out_file_format=array_record"
        ) from error
    except UserError:
        raise
    except Exception as error:  # TFDS passes on whatever a builder's code and files make it raise
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        raise UserError(
            f"the TFDS set {config.name!r} (split {config.split!r}) can't be read from {data_dir}: {reason}"
        ) from error
    for row in grain.MapDataset.source(source):
        yield {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}
