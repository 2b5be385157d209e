"""The label store: judged pairs in Parquet shards, each committed in one step and never judged again.

A shard is `shards/NUMBER.HASH.parquet`. The checksum is in the name, so that no kill can part it from the bytes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.files import read_shards, write_checked_parquet, write_json, write_parquet
from rlaif_jax.judge.score import Judge, Judgement, Pair, judge_pairs, plan_judging
from rlaif_jax.progress import progress

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("response_a", pa.string()),
        ("response_b", pa.string()),
        ("prob_a", pa.float64()),
        ("prob_a_forward", pa.float64()),
        ("prob_a_reversed", pa.float64()),
        ("rationale_forward", pa.string()),
        ("rationale_reversed", pa.string()),
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


def label(judge: Judge, pairs: Sequence[Pair], folder: epath.Path, description: str) -> pa.Table:
    """Judges `pairs` into `folder`/preferences.parquet, one row a pair in their order, and returns the table.

    Shards that an earlier run committed are kept. A pair that could not be scored stays in the table with its
    typed status and no label. Raises UserError where a committed shard is damaged, and where more than
    `judge.max_failure_rate` of the pairs failed.
    """
    size, shards = judge.config.shard_size, folder / "shards"
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    committed = _committed(shards, judge)
    done = sum(len(chosen) for i, chosen in enumerate(batches) if i in committed)
    plan = plan_judging(judge, pairs) if len(committed) < len(batches) else None
    with progress(None, description, total=2 * len(pairs), initial=2 * done, unit="prompt") as bar:
        for i, chosen in enumerate(batches):
            if i not in committed:
                judged = _table(judge, chosen, judge_pairs(judge, chosen, plan, i * size, bar.update))
                committed[i] = write_checked_parquet(shards, f"{i:05d}", judged).name, judged
    names, tables = zip(*(committed[i] for i in range(len(batches))), strict=True)
    table = pa.concat_tables(tables)
    write_parquet(folder / "preferences.parquet", table)
    write_json(folder / "manifest.json", _manifest(judge, table, names))
    _check_failures(table, judge.config.max_failure_rate, folder)
    return table


def _committed(folder: epath.Path, judge: Judge) -> dict[int, tuple[str, pa.Table]]:
    """Names and tables of the shards in `folder` by their number.

    Raises UserError where one is damaged, and where another judge or template wrote it.
    """
    shards = read_shards(folder, "its pairs alone are judged again")
    for shard, table in shards.items():
        for name, value in judge.provenance.items():
            others = set(table[name].to_pylist()) - {value}
            if others:
                raise UserError(
                    f"{shard} was labelled with {name}={others.pop()!r}, now it is {value!r}: use another --workdir, "
                    f"or delete {folder}"
                )
    return {int(shard.name.split(".")[0]): (shard.name, table) for shard, table in shards.items()}


def check_row(table: pa.Table, row: int) -> pa.Table:
    """`table`. Raises UserError where it has no such row."""
    if not 0 <= row < table.num_rows:
        raise UserError(f"no label row {row}: the file has rows 0 to {table.num_rows - 1}")
    return table


def replay(judge: Judge, table: pa.Table, row: int) -> tuple[dict, dict]:
    """Judges row `row` of a label table afresh. Returns the stored and the new fields of that row.

    Raises UserError where there is no such row.
    """
    check_row(table, row)
    stored = table.slice(row, 1).to_pylist()[0]
    pair = Pair(stored["prompt"], stored["response_a"], stored["response_b"])
    judgement = judge_pairs(judge, [pair], plan_judging(judge, [pair]), row, lambda prompts: None)
    return stored, _table(judge, [pair], judgement).to_pylist()[0]


def same_label(stored: dict, fresh: dict, tolerance: float = 1e-4) -> bool:
    """Whether a replayed row agrees: texts and hashes exactly, probabilities within rounding of the batch's shape."""

    def agrees(name: str) -> bool:
        old, new = stored[name], fresh[name]
        if isinstance(old, float) and isinstance(new, float):
            return abs(old - new) <= tolerance
        return old == new

    return all(map(agrees, SCHEMA.names))


def scored(table: pa.Table) -> pa.Table:
    """The rows that have a label."""
    return table.filter(pa.array(np.asarray(table["status"]) == "ok"))


def _table(judge: Judge, pairs: Sequence[Pair], judgements: Sequence[Judgement]) -> pa.Table:
    rows = [
        dataclasses.asdict(pair) | dataclasses.asdict(judgement) | judge.provenance
        for pair, judgement in zip(pairs, judgements, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def human_table(comparisons: Sequence[dict]) -> pa.Table:
    """A label table of comparisons by people: `prompt`, `response_a`, `response_b`, `prob_a` (1 or 0)."""
    rows = [dict.fromkeys(SCHEMA.names) | row | {"status": "ok", "judge": "human"} for row in comparisons]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _statuses(table: pa.Table) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in table["status"].value_counts().to_pylist()}


def _manifest(judge: Judge, table: pa.Table, shards: Sequence[str]) -> dict:
    return judge.provenance | {
        "preamble_tokens": len(judge.preamble),
        "rows": table.num_rows,
        "status": _statuses(table),
        "shards": list(shards),
    }


def _check_failures(table: pa.Table, limit: float, folder: epath.Path) -> None:
    # Two equal responses have nothing to compare: no label, but no failure of the judge either.
    failures = {status: n for status, n in _statuses(table).items() if status not in ("ok", "identical")}
    rate = sum(failures.values()) / table.num_rows
    if rate > limit:
        raise UserError(
            f"{rate:.1%} of the pairs in {folder} could not be scored ({failures}), more than "
            f"judge.max_failure_rate={limit}: see the status column of preferences.parquet"
        )
