import dataclasses
import json

import pyarrow.parquet as pq
import pytest

from rlaif_jax.errors import UserError, room_in
from rlaif_jax.judge import store
from tests.judge.conftest import LONG, PAIRS


def shard(folder, number):
    (path,) = (folder / "shards").glob(f"{number:05d}.*.parquet")
    return path


def test_a_committed_shard_is_never_judged_again(judge, tmp_path, monkeypatch):
    first = store.label(judge, PAIRS, tmp_path, "label")
    shard(tmp_path, 1).unlink()
    judged = []
    honest = store.judge_pairs
    monkeypatch.setattr(store, "judge_pairs", lambda j, pairs, *rest: judged.append(pairs) or honest(j, pairs, *rest))
    again = store.label(judge, PAIRS, tmp_path, "label")
    assert judged == [PAIRS[2:]]
    assert again.equals(first)
    assert pq.read_table(tmp_path / "preferences.parquet").equals(first)


def test_shards_of_another_judge_are_refused(judge, tmp_path):
    store.label(judge, PAIRS, tmp_path, "label")
    template = dataclasses.replace(judge.template, preamble="Another. ")
    with pytest.raises(UserError, match=r"00000\.\w+\.parquet was labelled with template_hash="):
        store.label(dataclasses.replace(judge, template=template), PAIRS, tmp_path, "label")


def _truncated(data):
    return data[:-1]


def _flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [_truncated, _flipped])
def test_a_damaged_shard_is_named_and_judged_again_alone_once_deleted(judge, tmp_path, monkeypatch, damage):
    first = store.label(judge, PAIRS, tmp_path, "label")
    damaged = shard(tmp_path, 1)
    damaged.write_bytes(damage(damaged.read_bytes()))
    judged = []
    honest = store.judge_pairs
    monkeypatch.setattr(store, "judge_pairs", lambda j, pairs, *rest: judged.append(pairs) or honest(j, pairs, *rest))
    with pytest.raises(UserError, match=rf"{damaged.name} is damaged.*Delete that file"):
        store.label(judge, PAIRS, tmp_path, "label")
    damaged.unlink()
    assert store.label(judge, PAIRS, tmp_path, "label").equals(first)
    assert judged == [PAIRS[2:]]
    assert shard(tmp_path, 1) == damaged  # the same name, so the same bytes


def test_failures_are_counted_and_too_many_stop_the_stage(judge, tmp_path):
    limits = dataclasses.replace(judge.config, max_length=len(judge.preamble) + 60, max_failure_rate=0.5)
    pairs = [PAIRS[2], LONG]
    table = store.label(dataclasses.replace(judge, config=limits), pairs, tmp_path / "a", "label")
    assert table["status"].to_pylist() == ["ok", "too_long"]
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["status"] == {"ok": 1, "too_long": 1}
    assert store.scored(table).num_rows == 1

    strict = dataclasses.replace(limits, max_failure_rate=0.1)
    with pytest.raises(UserError, match=r"50\.0%.*too_long"):
        store.label(dataclasses.replace(judge, config=strict), pairs, tmp_path / "b", "label")


def test_replay_reproduces_a_row_and_sees_a_changed_one(judge, tmp_path):
    table = store.label(judge, PAIRS, tmp_path, "label")
    stored, fresh = store.replay(judge, table, 1)
    assert store.same_label(stored, fresh)
    assert not store.same_label(stored | {"prob_a": stored["prob_a"] + 0.01}, fresh)
    assert not store.same_label(stored | {"response_a": "other"}, fresh)
    assert not store.same_label(stored | {"status": "too_long", "prob_a": None}, fresh)
    with pytest.raises(UserError, match="0 to 2"):
        store.replay(judge, table, 3)


def test_a_full_disk_keeps_the_committed_shards_and_no_half_file(judge, tmp_path, small_disk):
    first = store.label(judge, PAIRS, tmp_path / "elsewhere", "label")
    block = 4096
    small_disk.leave(-(-shard(tmp_path / "elsewhere", 0).stat().st_size // block) * block + block)
    folder = small_disk.folder / "label"
    with pytest.raises(UserError, match=rf"no space left on the disk of {folder}"), room_in(folder):
        store.label(judge, PAIRS, folder, "label")
    assert [path.name for path in (folder / "shards").iterdir()] == [shard(folder, 0).name]
    small_disk.leave(1 << 20)
    assert store.label(judge, PAIRS, folder, "label").equals(first)
