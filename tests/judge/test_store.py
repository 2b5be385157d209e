import dataclasses
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaif_jax.errors import UserError, room_in
from rlaif_jax.judge import store
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import Judgement
from rlaif_jax.judge.verdict import Verdict
from tests.judge.conftest import LONG, PAIRS


def labelled(judge, pairs, folder):
    assert store.label(judge, pairs, folder, "label")
    return pq.read_table(folder / "preferences.parquet")


def shard(folder, number):
    (path,) = (folder / "shards").glob(f"{number:05d}.*.parquet")
    return path


@pytest.fixture
def judged(monkeypatch):
    """The pairs that are judged, call by call."""
    calls, honest = [], store.judge_pairs
    monkeypatch.setattr(store, "judge_pairs", lambda j, pairs, *rest, **more: calls.append(pairs) or honest(
        j, pairs, *rest, **more))  # fmt: skip
    return calls


def test_a_committed_shard_is_never_judged_again(judge, tmp_path, judged):
    first = labelled(judge, PAIRS, tmp_path)
    shard(tmp_path, 1).unlink()
    judged.clear()
    again = labelled(judge, PAIRS, tmp_path)
    assert judged == [PAIRS[2:]]
    assert again.equals(first)


def test_no_pair_is_judged_twice(judge, tmp_path, judged):
    swapped = Pair(PAIRS[0].prompt, PAIRS[0].response_b, PAIRS[0].response_a)
    table = labelled(judge, [PAIRS[0], PAIRS[0], PAIRS[1], PAIRS[0], swapped, PAIRS[1]], tmp_path)
    assert [len(pairs) for pairs in judged] == [1, 1, 1]  # the same texts in the other order are another question
    rows = table.to_pylist()
    assert [row["row"] for row in rows] == list(range(6))
    assert rows[0] | {"row": 1} == rows[1]
    assert rows[0]["prob_a"] == rows[3]["prob_a"] != rows[4]["prob_a"]


def test_runs_share_labels_through_a_cache_but_never_failures(judge, tmp_path, judged):
    limits = dataclasses.replace(judge.config, max_length=len(judge.preamble) + 60, max_failure_rate=1.0)
    limits = dataclasses.replace(limits, cache=str(tmp_path / "cache"))
    judge = dataclasses.replace(judge, config=limits)
    first = labelled(judge, [PAIRS[2], LONG], tmp_path / "a")
    again = labelled(judge, [LONG, PAIRS[2]], tmp_path / "b")
    assert judged == [[PAIRS[2], LONG], [LONG]]
    assert again["prob_a"].to_pylist() == first["prob_a"].to_pylist()[::-1]
    others = (
        dataclasses.replace(judge, template=dataclasses.replace(judge.template, inverted=True)),
        dataclasses.replace(judge, config=dataclasses.replace(limits, shuffle_weights=True)),
        dataclasses.replace(judge, weights_hash="of another file"),
    )
    for i, other in enumerate(others):
        labelled(other, [PAIRS[2]], tmp_path / f"c{i}")
    assert judged[2:] == [[PAIRS[2]]] * 3


def test_a_failure_is_tried_again_by_itself_and_what_is_committed_stays(judge, tmp_path, monkeypatch, judged):
    expected, broken = labelled(judge, PAIRS, tmp_path / "whole"), {"on": True}
    honest = store.judge_pairs

    def failing(j, pairs, *rest, **more):
        found = honest(j, pairs, *rest, **more)
        bad = lambda x: dataclasses.replace(x, status="not_finite", verdict=None)  # noqa: E731
        return [bad(x) if broken["on"] and pair is PAIRS[1] else x for x, pair in zip(found, pairs, strict=True)]

    monkeypatch.setattr(store, "judge_pairs", failing)
    with pytest.raises(UserError, match=r"33\.3%.*not_finite"):
        labelled(judge, PAIRS, tmp_path / "failed")
    before = {path.name for path in (tmp_path / "failed" / "shards").iterdir()}
    broken["on"] = False
    judged.clear()
    mended = labelled(judge, PAIRS, tmp_path / "failed")
    assert judged == [[PAIRS[1]]]
    after = {path.name for path in (tmp_path / "failed" / "shards").iterdir()}
    assert before < after and len(after - before) == 1
    assert mended["status"].to_pylist() == ["ok"] * 3
    np.testing.assert_allclose(mended["prob_a"], expected["prob_a"], atol=1e-6)
    assert labelled(judge, PAIRS, tmp_path / "failed").equals(mended)
    assert len(judged) == 1


def test_a_pair_that_fails_among_others_is_judged_again_alone_at_once(judge, tmp_path, monkeypatch, judged):
    expected, honest = labelled(judge, PAIRS, tmp_path / "whole"), store.judge_pairs

    def fails_in_company(j, pairs, *rest, **more):
        found = honest(j, pairs, *rest, **more)
        bad = dataclasses.replace(found[0], status="not_finite", verdict=None)
        return found if len(pairs) == 1 else [bad, *found[1:]]

    monkeypatch.setattr(store, "judge_pairs", fails_in_company)
    judged.clear()
    table = labelled(judge, PAIRS, tmp_path / "mended")
    assert judged == [PAIRS[:2], PAIRS[:1], PAIRS[2:]]
    assert table["status"].to_pylist() == ["ok"] * 3
    np.testing.assert_allclose(table["prob_a"], expected["prob_a"], atol=1e-6)
    assert not list((tmp_path / "mended" / "shards").glob("retry*"))


def test_a_run_of_which_all_is_known_judges_nothing_and_says_whose_labels_they_are(judge, tmp_path, judged):
    judge = dataclasses.replace(judge, config=dataclasses.replace(judge.config, cache=str(tmp_path / "cache")))
    first = labelled(judge, PAIRS, tmp_path / "a")
    judged.clear()
    renamed = dataclasses.replace(judge, template=dataclasses.replace(judge.template, name="renamed"))
    again = labelled(renamed, PAIRS, tmp_path / "b")
    assert not any(judged)
    assert again["prob_a"].equals(first["prob_a"])
    assert set(again["template"].to_pylist()) == {"renamed"}


def test_labels_of_other_pairs_are_refused(judge, tmp_path):
    labelled(judge, PAIRS, tmp_path)
    changed = dataclasses.replace(PAIRS[2], response_b="changed")
    for pairs, shard_size in (
        ([*PAIRS[:2], changed], 2),
        ([PAIRS[2], *PAIRS[:2]], 2),
        (PAIRS[:1], 2),
        (PAIRS, 1),
    ):
        other = dataclasses.replace(judge, config=dataclasses.replace(judge.config, shard_size=shard_size))
        with pytest.raises(UserError, match="holds labels of other pairs"):
            labelled(other, pairs, tmp_path)


def test_a_shard_that_two_workers_judged_is_read_once(judge, tmp_path):
    first = labelled(judge, PAIRS, tmp_path)
    table = pq.read_table(shard(tmp_path, 1))
    half = table.set_column(table.schema.get_field_index("prob_a"), "prob_a", pa.array([0.5]))
    store.write_checked_parquet(tmp_path / "shards", "00001", half.cast(table.schema))
    again = labelled(judge, PAIRS, tmp_path)
    assert again["row"].to_pylist() == first["row"].to_pylist() == [0, 1, 2]


def test_workers_label_disjoint_shards_and_the_last_one_joins_them(judge, tmp_path, judged):
    pairs = [Pair(f"{i} {pair.prompt}", pair.response_a, pair.response_b) for i in range(3) for pair in PAIRS]
    alone = labelled(judge, pairs, tmp_path / "alone")
    judged.clear()
    done = [store.label(judge, pairs, tmp_path / "together", "label", store.Worker(i, 3)) for i in (2, 0, 1)]
    assert done == [False, False, True]
    together = [pair for call in judged for pair in call]
    assert len(together) == len(set(together)) == len(pairs)
    assert pq.read_table(tmp_path / "together" / "preferences.parquet").equals(alone)


def test_memory_is_bounded_by_a_shard(judge, tmp_path, monkeypatch):
    verdict = Verdict(0.5, 0.5, 0.5, None, None, None, 1.0)
    judgement = Judgement("ok", verdict, None, None, 9, 9, "0", "0")
    monkeypatch.setattr(store, "judge_pairs", lambda j, pairs, *rest, **more: [judgement] * len(pairs))
    monkeypatch.setattr(store, "plan_judging", lambda j, pairs: None)
    big = dataclasses.replace(judge, config=dataclasses.replace(judge.config, shard_size=50))

    def peak(count):
        pairs = [Pair(f"{i} " + "x" * 5_000, "a" * 1_000, "b" * 1_000) for i in range(count)]
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        assert store.label(big, pairs, tmp_path / str(count), "label")
        high = tracemalloc.get_traced_memory()[1] + max(pa.total_allocated_bytes() - before, 0)
        tracemalloc.stop()
        return high

    small, large = peak(200), peak(1_600)
    assert large - small < 1_400 * 1_000  # of 7 KB a pair, only what finds it again is kept


def test_shards_of_another_judge_are_refused(judge, tmp_path):
    labelled(judge, PAIRS, tmp_path)
    template = dataclasses.replace(judge.template, preamble="Another. ")
    with pytest.raises(UserError, match=r"00000\.\w+\.parquet was labelled with template_hash="):
        labelled(dataclasses.replace(judge, template=template), PAIRS, tmp_path)


def _truncated(data):
    return data[:-1]


def _flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [_truncated, _flipped])
def test_a_damaged_shard_is_named_and_judged_again_alone_once_deleted(judge, tmp_path, judged, damage):
    first = labelled(judge, PAIRS, tmp_path)
    damaged = shard(tmp_path, 1)
    damaged.write_bytes(damage(damaged.read_bytes()))
    judged.clear()
    with pytest.raises(UserError, match=rf"{damaged.name} is damaged.*Delete that file"):
        labelled(judge, PAIRS, tmp_path)
    damaged.unlink()
    assert labelled(judge, PAIRS, tmp_path).equals(first)
    assert judged == [PAIRS[2:]]
    assert shard(tmp_path, 1) == damaged  # the same name, so the same bytes


def test_failures_are_counted_and_too_many_stop_the_stage(judge, tmp_path):
    limits = dataclasses.replace(judge.config, max_length=len(judge.preamble) + 60, max_failure_rate=0.5)
    pairs = [PAIRS[2], LONG]
    table = labelled(dataclasses.replace(judge, config=limits), pairs, tmp_path / "a")
    assert table["status"].to_pylist() == ["ok", "too_long"]
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["status"] == {"ok": 1, "too_long": 1}
    assert store.scored(table).num_rows == 1

    strict = dataclasses.replace(limits, max_failure_rate=0.1)
    with pytest.raises(UserError, match=r"50\.0%.*too_long"):
        labelled(dataclasses.replace(judge, config=strict), pairs, tmp_path / "b")


def test_replay_reproduces_a_row_and_sees_a_changed_one(judge, tmp_path):
    table = labelled(judge, PAIRS, tmp_path)
    stored, fresh = store.replay(judge, table, 1)
    assert store.same_label(stored, fresh)
    assert not store.same_label(stored | {"prob_a": stored["prob_a"] + 0.01}, fresh)
    assert not store.same_label(stored | {"response_a": "other"}, fresh)
    assert not store.same_label(stored | {"status": "too_long", "prob_a": None}, fresh)


def test_a_full_disk_keeps_the_committed_shards_and_no_half_file(judge, tmp_path, small_disk):
    first = labelled(judge, PAIRS, tmp_path / "elsewhere")
    block = 4096
    small_disk.leave(-(-shard(tmp_path / "elsewhere", 0).stat().st_size // block) * block + block)
    folder = small_disk.folder / "label"
    with pytest.raises(UserError, match=rf"no space left on the disk of {folder}"), room_in(folder):
        labelled(judge, PAIRS, folder)
    assert [path.name for path in (folder / "shards").iterdir()] == [shard(folder, 0).name]
    small_disk.leave(1 << 20)
    assert labelled(judge, PAIRS, folder).equals(first)
