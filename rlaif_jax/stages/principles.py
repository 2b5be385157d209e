"""Judging under a constitution: each pair under a principle that is drawn, or under all of them, whose mean is learned.

Bai et al., arXiv 2212.08073, section 4.1.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.evaluation.panel import KNOWN, mean
from rlaif_jax.evaluation.principles import PAIR
from rlaif_jax.files import read_json, read_parquet, remove_leftovers, write_json, write_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.constitution import Principle, draw, load_constitution, principles_for
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.stages.joined import joined, numbers
from rlaif_jax.stages.run import Run

# Labels pairs as `judge.store.label` does, whose arguments after the judge it takes.
Labeller = Callable[..., bool]
FOLDER = "principles"  # of the labels under each principle, beside those that they come to


def by_principles(run: Run, label: Labeller) -> Labeller:
    """`label`, of judges that are asked for a principle, under the constitution, as `label.principles` says.

    "draw": the principle of a pair is a function of the seed and of its row. "ensemble": every principle judges every
    pair, one row each in the folder `principles`, and the label is their mean by weight.
    """
    return functools.partial(_label_drawn if run.config.label.principles == "draw" else _label_by_all, run, label)


def comparison_principles(run: Run, stage: str) -> list[Principle]:
    """The principles under which a stage compares responses."""
    return principles_for(stage, run.config.constitution, ("comparison",))


def draw_principles(
    run: Run, principles: Sequence[Principle], pairs: Iterable[Pair], rows: Sequence[int]
) -> list[Pair]:
    """Each pair under a principle. `rows`: their places, on which it depends."""
    drawn = draw(principles, run.order_seed("principles"), rows)
    return [_under(pair, principle) for pair, principle in zip(pairs, drawn, strict=True)]


def _under(pair: Pair, principle: Principle) -> Pair:
    return dataclasses.replace(pair, principle=principle.id, principle_text=principle.comparison)


def _label_drawn(run: Run, label: Labeller, pairs, folder: epath.Path, description: str, *worker) -> bool:
    drawn = draw_principles(run, comparison_principles(run, description), pairs, range(len(pairs)))
    if not label(drawn, folder, description, *worker):
        return False
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | _provenance(run))
    return True


def _label_by_all(
    run: Run, label: Labeller, pairs, folder: epath.Path, description: str, worker: store.Worker = store.ALONE
) -> bool:
    principles, own = comparison_principles(run, description), folder / FOLDER
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
    weights = {"weights": {principle.id: principle.weight for principle in principles}}
    write_json(folder / "manifest.json", manifest | counts | _provenance(run) | weights)
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


def principle_columns(file: epath.Path, columns: Mapping[str, list]) -> Mapping[str, list]:
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


def _provenance(run: Run) -> dict[str, str]:
    constitution = load_constitution(run.config.constitution.file)
    return {
        "constitution": constitution.name,
        "constitution_digest": constitution.digest,
        "principles": run.config.label.principles,
    }
