"""Label tables of the same pairs, by several judges or under several principles, put together as one."""

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from rlaif_jax.evaluation.panel import disagreement, vote_entropy
from rlaif_jax.judge import store
from rlaif_jax.judge.prompts import text_hash


def numbers(tables: Mapping[str, pa.Table], column: str) -> np.ndarray:
    """A column of each table: [tables, rows] float64, NaN for null."""
    return np.array([table[column].to_numpy() for table in tables.values()], float)


def joined(
    tables: Mapping[str, pa.Table],
    provenance: Mapping[str, str],
    status: np.ndarray,
    label: np.ndarray,
    average: Callable[[np.ndarray], np.ndarray],
    column: str,
) -> pa.Table:
    """The columns of the label store, without rationales, axes and ratings, which `tables` (by name) have of their own.

    It also has `column` (name -> probability, null where there is none), `disagreement` (their variance) and
    `vote_entropy` (nats). Probabilities of one order are averages, where all of them have orders. Token counts are of
    all tables together.

    status: [rows] texts. label: [rows] float64, the probability that a is better where the status is ok.
    average: [tables, rows] with NaN where there is no value -> [rows].
    """
    some, prob_a, labelled = next(iter(tables.values())), numbers(tables, "prob_a"), status == "ok"
    columns = {name: some[name] for name in ("row", *store.PAIR)}
    columns |= {name: [value] * len(status) for name, value in provenance.items()} | {"status": status.tolist()}
    values = {"prob_a": label, "answer_mass": average(numbers(tables, "answer_mass"))}
    for name in ("prob_a_forward", "prob_a_reversed"):
        one_order = numbers(tables, name)
        if np.array_equal(np.isfinite(one_order), np.isfinite(prob_a)):
            values[name] = average(one_order)
    values |= {"disagreement": disagreement(prob_a), "vote_entropy": vote_entropy(prob_a)}
    columns |= {name: _nullable(np.where(labelled, value, np.nan)) for name, value in values.items()}
    for name in ("tokens_forward", "tokens_reversed"):
        columns[name] = numbers(tables, name).sum(axis=0).astype(np.int32)
    for name in ("hash_forward", "hash_reversed"):
        hashes = (table[name].to_pylist() for table in tables.values())
        columns[name] = [text_hash("\x00".join(row)) for row in zip(*hashes, strict=True)]
    columns[column] = pa.StructArray.from_arrays(list(map(_nullable, prob_a)), names=list(tables))
    extra = ((column, columns[column].type), ("disagreement", pa.float64()), ("vote_entropy", pa.float64()))
    schema, nothing = pa.schema([*store.SCHEMA, *extra]), pa.nulls(len(status))
    return pa.table({name: columns.get(name, nothing) for name in schema.names}, schema=schema)


def _nullable(values: np.ndarray) -> pa.Array:
    """[rows] float64, NaN as null."""
    return pa.array(values, pa.float64(), from_pandas=True)
