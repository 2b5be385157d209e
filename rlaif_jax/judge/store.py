"""The label store: judged pairs in Parquet shards, each committed in one step and never judged again.

A shard is `shards/NUMBER.HASH.parquet`. The checksum is in the name, so that no kill can part it from the bytes. Pairs
that failed and were scored when they were tried again are in `shards/retry-...`, which is appended, never rewritten.
"""

import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from rlaif_jax.errors import Stopped, UserError
from rlaif_jax.files import read_shard, read_shards, replacing, shard_names, write_checked_parquet, write_json
from rlaif_jax.judge.prompts import Pair, text_hash
from rlaif_jax.judge.score import Judge, Judgement, Plan, judge_pairs, pair_hashes, plan_judging
from rlaif_jax.judge.verdict import Verdict
from rlaif_jax.parallel import processes
from rlaif_jax.progress import progress

_TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("response_a", pa.string()),
        ("response_b", pa.string()),
        ("principle", pa.string()),
        ("principle_text", pa.string()),
        ("prob_a", pa.float64()),
        ("prob_a_forward", pa.float64()),
        ("prob_a_reversed", pa.float64()),
        ("prob_a_axes", pa.list_(pa.float64())),
        ("rating_a", pa.float64()),
        ("rating_b", pa.float64()),
        ("answer_mass", pa.float64()),
        ("rationale_forward", _TEXTS),
        ("rationale_reversed", _TEXTS),
        ("status", pa.string()),
        ("judge", pa.string()),
        ("judge_hash", pa.string()),
        ("template", pa.string()),
        ("template_hash", pa.string()),
        ("tokens_forward", pa.int32()),
        ("tokens_reversed", pa.int32()),
        ("hash_forward", pa.string()),
        ("hash_reversed", pa.string()),
    ]
)
PAIR = tuple(field.name for field in dataclasses.fields(Pair))  # the columns of a pair
# Failures, the last one of a panel; two equal responses have nothing to compare, which is none.
UNSCORED = ("too_long", "not_finite", "panel_unscored")
_RETRIED = ("not_finite",)  # what another try may mend
_REMEDY = "its pairs alone are judged again"


class Worker(NamedTuple):
    """One of several processes that label disjoint shards of one job, each a command of its own."""

    index: int
    count: int


ALONE = Worker(0, 1)


def label(judge: Judge, pairs: Sequence[Pair], folder: epath.Path, description: str, worker: Worker = ALONE) -> bool:
    """Judges `pairs` into `folder`/preferences.parquet, one row a pair in their order; False until all are judged.

    Shards that an earlier run committed are kept, and no pair is judged twice: rows with the same prompts share what
    was said of the first. A pair that could not be scored stays in the table with its typed status and no label, and
    is tried again by itself. With several workers, each judges every `worker.count`-th shard, and the one that finds
    all shards there writes the table; the processes of one command share the shards in the same way. Raises UserError
    where a committed shard is damaged, and where more than `judge.max_failure_rate` of the pairs failed.
    """
    if processes.count() > 1 and not judge.everywhere:
        worker = Worker(processes.index(), processes.count())
    own = _judge_shards(judge, pairs, folder, description, worker)
    every = processes.gather(own._asdict())
    if any(each["stopped"] for each in every):
        raise Stopped
    written = {name for each in every for name in each["names"]}  # which a listing may not show yet
    done = processes.agree(lambda: _finish(judge, len(pairs), folder, written))
    if done is None:
        return False
    check_failures(done, judge.config.max_failure_rate, folder)
    return True


class _Judged(NamedTuple):
    """What a worker has done of a job."""

    names: list[str]  # of the shards that it has written
    stopped: bool  # SIGTERM has kept it from some of them


def _finish(judge: Judge, pairs: int, folder: epath.Path, written: Collection[str]) -> dict[str, int] | None:
    """Writes table and manifest where all shards are there; returns the rows by status. None while other workers' are
    missing.

    written: shards that are surely there.
    """
    names = sorted({*shard_names(folder / "shards"), *written})
    numbers = {_number(name) for name in names if not _is_retry(name)}
    if not numbers.issuperset(range(-(-pairs // judge.config.shard_size))):
        return None
    statuses, used = _assemble(folder, names)
    write_json(folder / "manifest.json", _manifest(judge, statuses, used))
    return dict(statuses)


def _judge_shards(judge: Judge, pairs: Sequence[Pair], folder: epath.Path, description: str, worker: Worker) -> _Judged:
    """Judges the shards of one worker that are missing."""
    size, shards = judge.config.shard_size, folder / "shards"
    batches = [range(start, min(start + size, len(pairs))) for start in range(0, len(pairs), size)]
    known, done, failed, names = Known(judge), set(), set(), []
    for path, table in read_shards(shards, _REMEDY, processes.agree(lambda: shard_names(shards))):
        _check_judge(judge, path, table)
        retry, number = _is_retry(path.name), None if _is_retry(path.name) else _number(path.name)
        _check_pairs(pairs, path, table, None if retry else batches[number : number + 1])
        known.add(path, table)
        if retry:
            failed -= set(table["row"].to_pylist())
        else:
            done.add(number)
            failed |= set(_failures(table))
    if again := sorted(row for row in failed if row // size % worker.count == worker.index):
        names += _retry(judge, pairs, again, shards)
    mine = [i for i in range(len(batches)) if i not in done and i % worker.count == worker.index]
    if mine:
        plan = plan_judging(judge, pairs)
        finished = sum(len(batches[i]) for i in done)
        with progress(None, description, total=2 * len(pairs), initial=2 * finished, unit="prompt") as bar:
            for i in mine:
                began = time.perf_counter()
                table = _judge(judge, pairs, batches[i], plan, known, bar.update)
                path = _commit(judge, shards, f"{i:05d}", table)
                names.append(path.name)
                known.add(path, table)
                if not judge.everywhere or processes.first():
                    _note_time(folder, worker, i, table, time.perf_counter() - began)
                if processes.stop_point() if judge.everywhere else processes.stop_wanted():
                    return _Judged(names, stopped=True)
    return _Judged(names, stopped=False)


class Known:
    """Where the labels are that this judge has given before, by the hashes of their prompts.

    Only what a pair's text decides is known: with rationales drawn at random, every row has its own.
    """

    def __init__(self, judge: Judge):
        self._where: dict[tuple, tuple[epath.Path, int]] = {}
        self._on = judge.reasoner is None or judge.reasoner.sampler.sampling.temperature == 0
        self._shared: epath.Path | None = None
        if judge.config.cache and self._on:
            self._shared = epath.Path(judge.config.cache) / _identity(judge)
            folder = self._shared
            names = processes.agree(lambda: shard_names(folder))
            for path, table in read_shards(self._shared, _REMEDY, names):
                self.add(path, table)

    def key(self, judge: Judge, row: int, pair: Pair) -> tuple:
        """What tells a label from another one's."""
        return pair_hashes(judge, pair) if self._on else (row,)

    def add(self, path: epath.Path, table: pa.Table) -> None:
        """Remembers the labels of a shard."""
        if self._on:
            columns = (table[name].to_pylist() for name in ("hash_forward", "hash_reversed", "status"))
            for i, (forward, backward, status) in enumerate(zip(*columns, strict=True)):
                if status == "ok":  # a failure is never what a later run is told
                    self._where.setdefault((forward, backward), (path, i))

    def find(self, keys: Collection[tuple]) -> dict[tuple, dict]:
        """The rows of those that are known."""
        wanted: dict[epath.Path, dict] = {}
        for key in keys:
            if key in self._where:
                path, i = self._where[key]
                wanted.setdefault(path, {})[key] = i
        found = {}
        for path, rows in wanted.items():
            table = read_shard(path, _REMEDY)
            found |= {key: table.slice(i, 1).to_pylist()[0] for key, i in rows.items()}
        return found

    def share(self, table: pa.Table) -> None:
        """Puts new labels where other runs find them."""
        table = scored(table)
        if self._shared is not None and table.num_rows:
            write_checked_parquet(self._shared, f"{time.time_ns()}", table)


def _identity(judge: Judge) -> str:
    """A hash of all that a label depends on beside its prompts."""
    config = judge.config
    shuffled = (config.shuffle_weights, judge.seed if config.shuffle_weights else 0)
    rationale = (config.rationale.samples, config.rationale.max_new_tokens, config.rationale.sampler.cache_dtype)
    parts = (judge.weights_hash, judge.template.digest, config.dtype, config.max_length, *shuffled)
    return text_hash(repr(parts + (rationale if judge.reasoner else ())))


def _judge(judge: Judge, pairs, rows: Sequence[int], plan: Plan, known: Known, on_prompts) -> pa.Table:
    """The labels of `rows`, judged or known."""
    keys = {row: known.key(judge, row, pairs[row]) for row in rows}
    found = known.find(set(keys.values()))
    first = {key: row for row, key in reversed(keys.items()) if key not in found}  # of rows that ask the same
    fresh = sorted(first.values())
    judgements = judge_pairs(judge, [pairs[row] for row in fresh], plan, fresh, on_prompts)
    judged = [_row(judge, row, pairs[row], judgement) for row, judgement in zip(fresh, judgements, strict=True)]
    mended = _alone(judge, pairs, [row["row"] for row in judged if row["status"] in _RETRIED])
    judged = [mended.get(row["row"], row) for row in judged]
    if not judge.everywhere or processes.first():
        known.share(_table(judged))
    found |= {keys[row["row"]]: row for row in judged}
    on_prompts(2 * (len(rows) - len(fresh)))
    texts = {row: dataclasses.asdict(pairs[row]) for row in rows}
    return _table([found[keys[row]] | judge.provenance | texts[row] | {"row": row} for row in rows])


def _alone(judge: Judge, pairs, rows: Sequence[int]) -> dict[int, dict]:
    """Judges rows that failed again, each by itself; those that are now scored."""
    plan = plan_judging(judge, [pairs[row] for row in rows])
    judged = (_row(judge, row, pairs[row], judge_pairs(judge, [pairs[row]], plan, [row])[0]) for row in rows)
    return {row["row"]: row for row in judged if row["status"] == "ok"}


def _retry(judge: Judge, pairs, rows: Sequence[int], shards: epath.Path) -> list[str]:
    """Another try at rows that an earlier run could not score; what is scored now is committed beside them.

    Returns the name of that shard, if there is one.
    """
    if not (mended := _alone(judge, pairs, rows)):
        return []
    stem = f"retry-{time.time_ns()}-{rows[0]}"
    return [_commit(judge, shards, stem, _table(list(mended.values()))).name]


def _commit(judge: Judge, shards: epath.Path, stem: str, table: pa.Table) -> epath.Path:
    """Writes a shard: the process that has judged it, or the first of all that have."""
    if judge.everywhere:
        return shards / processes.agree(lambda: write_checked_parquet(shards, stem, table).name)
    return write_checked_parquet(shards, stem, table)


def _is_retry(name: str) -> bool:
    return name.startswith("retry")


def _number(name: str) -> int:
    return int(name.split(".")[0])


def _check_pairs(pairs, shard: epath.Path, table: pa.Table, batch: list[range] | None) -> None:
    """Raises UserError where the shard is not of these pairs; `batch`: its rows, if it is not of single ones."""
    rows = table["row"].to_pylist()
    same = (not batch or rows == list(batch[0])) and batch != [] and max(rows, default=-1) < len(pairs)
    texts = zip(*(table[name].to_pylist() for name in PAIR), strict=True)
    if not same or any(text != dataclasses.astuple(pairs[row]) for row, text in zip(rows, texts, strict=True)):
        raise UserError(f"{shard} holds labels of other pairs: use another folder, or delete {shard.parent}")


def _assemble(folder: epath.Path, names: Sequence[str]) -> tuple[collections.Counter, list[str]]:
    """Writes the table from the shards, one at a time. Returns the rows by status, and the names of the shards used."""
    shards, statuses, used = folder / "shards", collections.Counter(), [name for name in names if _is_retry(name)]
    retried = {}
    for name in used:
        retried |= {row["row"]: row for row in read_shard(shards / name, _REMEDY).to_pylist()}
    # Two workers may have judged the same; retries come after all shards.
    first = {_number(name): name for name in reversed(names) if not _is_retry(name)}
    with _parquet(folder / "preferences.parquet") as writer:
        for path, table in read_shards(shards, _REMEDY, [first[number] for number in sorted(first)]):
            if retried and any(row in retried for row in table["row"].to_pylist()):
                table = _table([retried.get(row["row"], row) for row in table.to_pylist()])
            writer.write_table(table)
            statuses.update(table["status"].to_pylist())
            used.append(path.name)
    return statuses, sorted(used)


def _manifest(judge: Judge, statuses: Mapping[str, int], names: list[str]) -> dict:
    return judge.provenance | {
        "method": judge.template.method,
        "axes": list(judge.template.axes) if len(judge.template.axes) > 1 else [],
        "preamble_tokens": len(judge.preamble),
        "rows": sum(statuses.values()),
        "status": dict(statuses),
        "shards": names,
    }


@contextlib.contextmanager
def _parquet(path: epath.Path) -> Iterator[pq.ParquetWriter]:
    with replacing(path) as temporary, temporary.open("wb") as file, pq.ParquetWriter(file, SCHEMA) as writer:
        yield writer


def _check_judge(judge: Judge, shard: epath.Path, table: pa.Table) -> None:
    """Raises UserError where another judge or template wrote the shard."""
    for name, value in judge.provenance.items():
        others = set(table[name].to_pylist()) - {value}
        if others:
            raise UserError(
                f"{shard} was labelled with {name}={others.pop()!r}, now it is {value!r}: use another --workdir, "
                f"or delete {shard.parent}"
            )


def _failures(table: pa.Table) -> list[int]:
    """The rows that another try may mend."""
    statuses = zip(table["row"].to_pylist(), table["status"].to_pylist(), strict=True)
    return [row for row, status in statuses if status in _RETRIED]


def _note_time(folder: epath.Path, worker: Worker, shard: int, table: pa.Table, seconds: float) -> None:
    tokens = sum(sum(table[name].to_pylist()) for name in ("tokens_forward", "tokens_reversed"))
    line = {"shard": shard, "pairs": table.num_rows, "prompt_tokens": tokens, "seconds": round(seconds, 3)}
    own = f"timing.{worker.index}.jsonl" if worker.index else "timing.jsonl"  # what two append to may lose lines
    with (folder / own).open("a") as file:
        file.write(json.dumps(line) + "\n")


def replay(judge: Judge, table: pa.Table, row: int) -> tuple[dict, dict]:
    """Judges row `row` of a label table afresh. Returns the stored and the new fields of that row."""
    stored = table.slice(row, 1).to_pylist()[0]
    pair = pair_of(stored)
    (judgement,) = judge_pairs(judge, [pair], ids=[row])
    return stored, _table([_row(judge, row, pair, judgement)]).to_pylist()[0]


def pair_of(row: Mapping) -> Pair:
    """The pair that a row of a label table is of; earlier tables have no principles."""
    return Pair(*(row.get(name) for name in PAIR))


def same_label(stored: dict, fresh: dict, tolerance: float = 1e-4) -> bool:
    """Whether a replayed row agrees: texts and hashes exactly, probabilities within rounding of the batch's shape."""

    def agrees(name: str) -> bool:
        old, new = stored.get(name), fresh[name]
        if name == "prob_a_axes" and old and new:
            return bool(np.allclose(old, new, rtol=0, atol=tolerance))
        if isinstance(old, float) and isinstance(new, float):
            return abs(old - new) <= tolerance
        return old == new

    return all(map(agrees, SCHEMA.names))


def scored(table: pa.Table) -> pa.Table:
    """The rows that have a label."""
    return table.filter(pa.array(np.asarray(table["status"]) == "ok"))


_VERDICT = Verdict._fields


def _row(judge: Judge, row: int, pair: Pair, judgement: Judgement) -> dict:
    found = dataclasses.asdict(judgement) | dataclasses.asdict(pair) | judge.provenance | {"row": row}
    verdict = found.pop("verdict")
    return found | (dict.fromkeys(_VERDICT) if verdict is None else judgement.verdict._asdict())


def _table(rows: Sequence[Mapping]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def human_table(comparisons: Sequence[dict]) -> pa.Table:
    """A label table of comparisons by people: `prompt`, `response_a`, `response_b`, `prob_a` (1 or 0)."""
    every = dict.fromkeys(SCHEMA.names) | {"status": "ok", "judge": "human"}
    return _table([every | row | {"row": i} for i, row in enumerate(comparisons)])


def check_failures(statuses: Mapping[str, int], limit: float, folder: epath.Path) -> None:
    """Raises UserError where a larger share than `limit` of the rows, counted by status, has failed."""
    failures = {status: n for status, n in statuses.items() if status in UNSCORED}
    rate = sum(failures.values()) / sum(statuses.values())
    if rate > limit:
        raise UserError(
            f"{rate:.1%} of the pairs in {folder} could not be scored ({failures}), more than "
            f"the max_failure_rate={limit} of its judge: see the status column of preferences.parquet"
        )
