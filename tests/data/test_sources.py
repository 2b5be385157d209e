import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaif_jax.data import tfds_builders
from rlaif_jax.data.sources import Malformed, SourceConfig, read
from rlaif_jax.errors import UserError

ROWS = [{"subreddit": "a", "title": f"t{i}", "post": f"p{i} é", "summary": f"s{i}"} for i in range(5)]
FIELDS = {"title": "title", "reply": "summary"}
EXPECTED = [{"title": row["title"], "reply": row["summary"]} for row in ROWS]


def source(kind, path, name="", split="", fields=FIELDS, limit=0):
    return SourceConfig(kind, path, name, split, fields, limit)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "plain.jsonl").write_text(lines(ROWS))
    with gzip.open(folder / "packed.jsonl.gz", "wt") as file:
        file.write(lines(ROWS))
    (folder / "part-0.jsonl").write_text(lines(ROWS[:2]))
    (folder / "part-1.jsonl").write_text(lines(ROWS[2:]))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "table.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder / "dict")
    (folder / "raw").mkdir()
    (folder / "raw" / "train.jsonl").write_text(lines(ROWS))
    assert tfds_builders.main(["", "rlaif_tldr", str(folder / "raw"), str(folder / "tfds")]) == 0
    return folder


SOURCES = {
    "json lines": source("jsonl", "plain.jsonl"),
    "gzipped": source("jsonl", "packed.jsonl.gz"),
    "several files": source("jsonl", "part-*.jsonl"),
    "parquet": source("parquet", "table.parquet"),
    "datasets folder": source("datasets", "saved"),
    "datasets folder with splits": source("datasets", "dict", split="train"),
    "tfds": source("tfds", "tfds", "rlaif_tldr", "train"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_gives_the_same_rows(folder, name):
    assert sorted(read(SOURCES[name], str(folder)), key=lambda row: row["title"]) == EXPECTED


def test_the_first_rows_are_taken(folder):
    assert list(read(source("jsonl", "plain.jsonl", limit=2), str(folder))) == EXPECTED[:2]


@pytest.mark.parametrize(
    ("limit", "rows"), [(2, [0, 2]), (4, [0, 2, 1, 3]), (5, [0, 2, 1, 3, 4]), (0, [0, 1, 2, 3, 4])]
)
def test_a_limit_leaves_no_file_out(folder, limit, rows):
    found = list(read(source("jsonl", "part-*.jsonl", limit=limit), str(folder)))
    assert found == [EXPECTED[row] for row in rows]


def test_files_may_name_the_split_of_a_row(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines(row | {"split": "ab"[i % 2]} for i, row in enumerate(ROWS)))
    assert list(read(source("jsonl", "x.jsonl", split="b", limit=1), str(tmp_path))) == [EXPECTED[1]]


def test_dots_reach_into_lists_and_objects(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines([{"info": {"post": "p"}, "summaries": [{"text": "s0"}, {"text": "s1"}]}]))
    fields = {"post": "info.post", "response_b": "summaries.1.text"}
    assert list(read(source("jsonl", "x.jsonl", fields=fields), str(tmp_path))) == [{"post": "p", "response_b": "s1"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{nonsense", "not JSON"),
        (b"[1, 2]", "not an object"),
        (b'{"title": "x"}', "no field summary"),
        (b'{"title": "\xff", "summary": "s"}', "not UTF-8"),
        (b'{"title": "\\ud800", "summary": "s"}', "not UTF-8"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_a_bad_line_is_one_malformed_row(tmp_path, line, reason):
    (tmp_path / "x.jsonl").write_bytes(lines(ROWS[:1]).encode() + line + b"\n\n" + lines(ROWS[1:]).encode())
    rows = list(read(source("jsonl", "x.jsonl"), str(tmp_path)))
    assert rows == [EXPECTED[0], Malformed(reason), *EXPECTED[1:]]


def bad_gzip(folder):
    (folder / "bad.jsonl.gz").write_bytes((folder / "packed.jsonl.gz").read_bytes()[:60])


def flipped_gzip(folder):
    data = bytearray((folder / "packed.jsonl.gz").read_bytes())
    data[40:60] = bytes(byte ^ 0xFF for byte in data[40:60])
    (folder / "flipped.jsonl.gz").write_bytes(data)


def bad_parquet(folder):
    (folder / "bad.parquet").write_bytes((folder / "table.parquet").read_bytes()[:-20])


@pytest.mark.parametrize(
    ("config", "damage", "message"),
    [
        (source("jsonl", "nowhere.jsonl"), None, "no data file at .*nowhere.jsonl"),
        (source("jsonl", "none-*.jsonl"), None, "no data file at .*none-"),
        (source("jsonl", "bad.jsonl.gz"), bad_gzip, "bad.jsonl.gz is damaged"),
        (source("jsonl", "flipped.jsonl.gz"), flipped_gzip, "flipped.jsonl.gz is damaged"),
        (source("jsonl", "ra*"), None, "no data file"),
        (source("parquet", "bad.parquet"), bad_parquet, "bad.parquet is damaged"),
        (source("datasets", "saved/nothing"), None, "saved/nothing"),
        (source("datasets", "dict", split="test"), None, "split 'test'"),
        (source("tfds", "tfds", "rlaif_tldr", "test"), None, "Unknown split 'test'"),
        (source("tfds", "elsewhere", "rlaif_tldr", "train"), None, "not prepared in .*elsewhere"),
        (source("tfds", "tfds", "no_such_set", "train"), None, "no_such_set"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_clear_line(folder, config, damage, message, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    if damage:
        damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        list(read(config, str(folder)))
    assert "\n" not in str(caught.value)


def test_tfrecord_needs_a_conversion_that_is_named(folder):
    version = folder / "tfds" / "rlaif_tldr" / "1.0.0"
    old = version.parent.parent.parent / "records" / "other_set" / "1.0.0"
    old.mkdir(parents=True)
    info = json.loads((version / "dataset_info.json").read_text())
    (old / "dataset_info.json").write_text(json.dumps(info | {"name": "other_set", "fileFormat": "tfrecord"}))
    (old / "features.json").write_text((version / "features.json").read_text())
    with pytest.raises(UserError, match=r"convert_format --root_data_dir=.*--out_file_format=array_record"):
        list(read(source("tfds", "records", "other_set", "train"), str(folder)))
