"""Judging under a constitution: each pair under a principle that is drawn, or under all of them, whose mean is learned.

Bai et al., arXiv 2212.08073, section 4.1.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.evaluation.panel import mean
from rlaif_jax.evaluation.principles import FOLDER
from rlaif_jax.files import read_json, read_parquet, remove_leftovers, write_json, write_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.constitution import Principle, draw, load_constitution, principles_for
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.stages.joined import joined, numbers
from rlaif_jax.stages.run import Run

# Labels pairs as `judge.store.label` does, whose arguments after the judge it takes.
Labeller = Callable[..., bool]


def by_principles(run: Run, label: Labeller, principles: Sequence[Principle], seed: int) -> Labeller:
    """`label`, of judges that are asked for a principle, under these, as `label.principles` says.

    "draw": the principle of a pair is a function of the seed and of its row. "ensemble": every principle judges every
    pair, one row each in the folder `principles`, and the label is their mean by weight.
    """
    if run.config.label.principles == "ensemble":
        return functools.partial(_label_by_all, run, label, principles)
    return functools.partial(_label_drawn, run, label, principles, seed)


def comparison_principles(run: Run, stage: str) -> list[Principle]:
    """The principles under which a stage compares responses; it says which it never draws. None where it has none."""
    if run.config.label.principles == "none":
        return []
    return principles_for(stage, run.config.constitution, ("comparison",))


def draws(run: Run) -> int:
    """The seed by which pairs that are learned from draw principles; each round has its own."""
    return run.order_seed("principles")


def evaluation_draws(run: Run) -> int:
    """That by which pairs draw them in evaluation, of any round: rounds then differ by no luck of the draw."""
    return draws(run.in_round(1))


def draw_principles(
    principles: Sequence[Principle], seed: int, pairs: Iterable[Pair], rows: Sequence[int]
) -> list[Pair]:
    """Each pair under a principle. `rows`: their places, on which it depends."""
    return [_under(pair, each) for pair, each in zip(pairs, draw(principles, seed, rows), strict=True)]


def _under(pair: Pair, principle: Principle) -> Pair:
    return dataclasses.replace(pair, principle=principle.id, principle_text=principle.comparison)


def _label_drawn(
    run: Run, label: Labeller, principles: Sequence[Principle], seed: int, pairs, folder: epath.Path, *more
) -> bool:
    if not label(draw_principles(principles, seed, pairs, range(len(pairs))), folder, *more):
        return False
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | _provenance(run, principles))
    return True


def _label_by_all(
    run: Run,
    label: Labeller,
    principles: Sequence[Principle],
    pairs,
    folder: epath.Path,
    description: str,
    worker: store.Worker = store.ALONE,
) -> bool:
    own = folder / FOLDER
    if worker.count == 1:
        remove_leftovers(own)
    # A pair's principles stand together, so that they read it together.
    if not label([_under(pair, each) for pair in pairs for each in principles], own, description, worker):
        return False
    table = combined(read_parquet(own / "preferences.parquet"), principles)
    statuses = collections.Counter(table["status"].to_pylist())
    write_parquet(folder / "preferences.parquet", table)
    manifest = {name: value for name, value in read_json(own / "manifest.json").items() if name != "shards"}
    counts = {"rows": table.num_rows, "status": dict(statuses)}
    write_json(folder / "manifest.json", manifest | counts | _provenance(run, principles))
    store.check_failures(statuses, run.config.judge.max_failure_rate, folder)
    return True


def combined(table: pa.Table, principles: Sequence[Principle]) -> pa.Table:
    """The labels of an ensemble of principles: the mean, by weight, over those under which a pair could be scored.

    table: its rows are those of the first pair under each principle, then those of the second, and so on. A pair has a
    label where principles with more than half of the weight scored it, else the status of the first that did not. The
    columns are those of `stages.joined.joined`, with `prob_a_principles` (id -> probability).
    """
    count = len(principles)
    tables = {each.id: table.take(np.arange(i, table.num_rows, count)) for i, each in enumerate(principles)}
    weights = np.array([principle.weight for principle in principles])
    weights /= weights.sum()
    average = functools.partial(mean, weights=weights)
    statuses = np.array([one["status"].to_pylist() for one in tables.values()])  # [principles, pairs]
    failed = statuses != "ok"
    first = np.take_along_axis(statuses, failed.argmax(axis=0)[None], axis=0)[0]
    status = np.where(weights @ failed < 0.5, "ok", first)
    provenance = {name: table[name][0].as_py() for name in ("judge", "judge_hash", "template", "template_hash")}
    found = joined(tables, provenance, status, average(numbers(tables, "prob_a")), average, "prob_a_principles")
    nothing, rows = pa.nulls(len(status), pa.string()), pa.array(range(len(status)))
    for name, values in (("row", rows), ("principle", nothing), ("principle_text", nothing)):
        found = found.set_column(found.schema.get_field_index(name), name, values)
    return found


def _provenance(run: Run, principles: Sequence[Principle]) -> dict[str, Any]:
    constitution = load_constitution(run.config.constitution.file)
    return {
        "constitution": constitution.name,
        "constitution_digest": constitution.digest,
        "principles": run.config.label.principles,
        "weights": {principle.id: principle.weight for principle in principles},
    }
