"""What a label file says of each principle that its pairs were judged under, and how far principles agree."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rlaif_jax.evaluation.audit import agreement, share_a, slots
from rlaif_jax.evaluation.panel import KNOWN, alphas, disagreement
from rlaif_jax.evaluation.statistics import Figure, mean_ci
from rlaif_jax.files import read_json, read_parquet

Columns = Mapping[str, Sequence[Any]]
PAIR = ("prompt", "response_a", "response_b")
FOLDER = "principles"  # of the labels under each principle of an ensemble, beside those that they come to
EXAMPLES = 2  # pairs that a principle is surest of, for each response
DISPUTED = 6  # pairs on which principles differ most


def principle_columns(file: epath.Path, columns: Columns) -> Columns:
    """The columns of a label file with a row for each pair under each principle: its own, or those that an ensemble of
    principles made them of, with what `columns` know of the pairs beside.
    """
    own = file.parent / FOLDER / "preferences.parquet"
    if not own.exists():
        return columns
    found = read_parquet(own).to_pydict()
    pairs = list(zip(*(found[name] for name in PAIR), strict=True))
    for name in KNOWN:
        if name in columns:
            known = dict(zip(zip(*(columns[x] for x in PAIR), strict=True), columns[name], strict=True))
            found[name] = [known.get(pair) for pair in pairs]
    return found


def comparable(file: epath.Path) -> tuple[str, ...]:
    """The principles under which the pairs of a label file could be judged, as the manifest beside it says."""
    manifest = file.parent / "manifest.json"
    found = read_json(manifest) if manifest.exists() else {}
    weights = found.get("weights") if isinstance(found, dict) else None  # it may be of something else
    return tuple(weights) if isinstance(weights, dict) else ()


def principle_audit(columns: Columns, resamples: int, seed: int, known: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of the principles in a label file, `NAME/ID`; none where no pair has one.

    known: principles that may have decided no pair, and still have a `principle_use`, of 0.

    columns: of the label store, a row for each pair under each principle that judged it; those in `KNOWN` may say
    which response is better (null or 0.5 where they do not).

    Of each principle: `principle_use`, the share of all pairs that it labelled; `principle_decisiveness`, |2 prob_a -
    1|; `principle_share_a`, how often it names a; `principle_first_slot`, how often the first slot, whatever is in it;
    `principle_ground_truth` and `principle_human`, how often it sides with them. `principle_surest_a` and `_b` are the
    rows that it decided most surely. Where several principles judged the same pairs: `principle_agreement/ID/ID`,
    Krippendorff's `principle_alpha/votes` and `/prob_a`, and `principle_disputed`, rows of which each is the first of
    a pair on which they differ most.
    """
    rows = [row for row, principle in enumerate(columns.get("principle", ())) if principle is not None]
    if not rows:
        return {}
    pairs, prob_a = by_principle(columns, known)

    def mean(values) -> Figure:
        return mean_ci(values, resamples, seed)

    figures: dict[str, Any] = {}
    for i, name in enumerate(names := list(prob_a)):
        own = [row for row in rows if columns["principle"][row] == name and columns["status"][row] == "ok"]
        figures |= {f"{key}/{name}": figure for key, figure in _of_one(columns, own, mean).items()}
        figures[f"principle_use/{name}"] = mean(np.isfinite(prob_a[name]))
        for other in names[:i]:
            both = np.isfinite(prob_a[name]) & np.isfinite(prob_a[other])
            if both.any():
                agree = agreement(prob_a[name][both], prob_a[other][both])
                figures[f"principle_agreement/{other}/{name}"] = mean(agree)
    table = np.array(list(prob_a.values()))
    if np.any(np.isfinite(table).sum(axis=0) >= 2):
        figures |= {f"principle_{name}": figure for name, figure in alphas(table, resamples, seed).items()}
        gaps = np.nan_to_num(disagreement(table))
        order = np.argsort(-gaps, kind="stable")[:DISPUTED]
        figures["principle_disputed"] = [pairs[i] for i in order if gaps[i] > 0]
    return figures


def _of_one(columns: Columns, rows: Sequence[int], mean) -> dict[str, Any]:
    """The figures of one principle, whose scored rows are given."""
    if not rows:
        return {}
    some = {name: [values[row] for row in rows] for name, values in columns.items()}
    prob_a = np.array(some["prob_a"], float)
    figures = {
        "principle_decisiveness": mean(np.abs(2 * prob_a - 1)),
        "principle_share_a": mean(share_a(prob_a)),
        "principle_surest_a": [rows[i] for i in np.argsort(-prob_a, kind="stable")[:EXAMPLES] if prob_a[i] > 0.5],
        "principle_surest_b": [rows[i] for i in np.argsort(prob_a, kind="stable")[:EXAMPLES] if prob_a[i] < 0.5],
    }
    if "first_slot_rate" in (found := slots(some, mean)):
        figures["principle_first_slot"] = found["first_slot_rate"]
    for name in KNOWN:
        better = np.array([np.nan if value is None else value for value in some.get(name, ())], float)
        said = np.isfinite(better) & (better != 0.5)
        if said.any():
            figures[f"principle_{name}"] = mean(agreement(prob_a[said], better[said]))
    return figures


def by_principle(columns: Columns, known: Sequence[str] = ()) -> tuple[list[int], dict[str, np.ndarray]]:
    """The first row of each different pair, and for each principle its labels of them: [pairs], NaN where it has none.

    Principles are those in `known`, then others that a row has.

    A pair that a principle judged twice has the label of the last row.
    """
    places: dict[tuple[str, ...], int] = {}
    firsts: list[int] = []
    for row, pair in enumerate(zip(*(columns[name] for name in PAIR), strict=True)):
        if pair not in places:
            places[pair] = len(firsts)
            firsts.append(row)
    names = dict.fromkeys((*known, *(name for name in columns["principle"] if name is not None)))
    labels = {name: np.full(len(firsts), np.nan) for name in names}
    wanted = ("principle", "status", "prob_a", *PAIR)
    for name, status, prob_a, *pair in zip(*(columns[column] for column in wanted), strict=True):
        if name is not None and status == "ok":
            labels[name][places[tuple(pair)]] = prob_a
    return firsts, labels


def names_of(figures: Mapping[str, Any]) -> list[str]:
    """The principles that have figures."""
    return [name.split("/", 1)[1] for name in figures if name.startswith("principle_use/")]


def agreements(figures: Mapping[str, Any]) -> dict[tuple[str, str], Figure]:
    """How often two principles are on one side, both ways round; none where none judged the same pairs."""
    found = {}
    for one, other in itertools.permutations(names_of(figures), 2):
        figure = figures.get(f"principle_agreement/{one}/{other}") or figures.get(f"principle_agreement/{other}/{one}")
        if figure:
            found[one, other] = figure
    return found
