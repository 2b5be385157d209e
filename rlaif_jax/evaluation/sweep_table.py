"""The table of a sweep: each arm's figures over seeds, and its differences from a baseline arm, as Markdown and CSV."""

import csv
import io
from collections.abc import Container, Iterable, Mapping, Sequence

from rlaif_jax.evaluation.statistics import Figure, paired_differences, show_figure, t_ci

# One figure of the finished cells: arm -> seed -> its mean in that cell. Every arm is there, be it empty.
Values = Mapping[str, Mapping[int, float]]
# arm -> seed -> the cell's folder, relative to the table's.
Cells = Mapping[str, Mapping[int, str]]
COLUMNS = ("arm", "figure", "quantity", "seed", "value", "ci_low", "ci_high", "n", "cell")


def markdown(figures: Mapping[str, Values], baseline: str, cells: Cells, failed: Container[str]) -> str:
    """Three tables: means, differences from the baseline arm, and links to the cells.

    Args:
      figures: name -> values.
      cells: every cell, failed ones too.
      failed: the paths of those that failed.
    """
    arms, seeds = list(cells), list(cells[baseline])
    means = ([arm, *(_with_n(t_ci([*values[arm].values()])) for values in figures.values())] for arm in arms)
    links = {
        path: f"[{'failed' if path in failed else 'done'}]({path}/cell.json)"
        for by_seed in cells.values()
        for path in by_seed.values()
    }
    seed_titles = [f"seed {seed}" for seed in seeds]
    parts = [
        "Mean over seeds [95 % interval over seeds, Student t] (n seeds)",
        _table(["arm", *(f"`{name}`" for name in figures)], means),
        f"Difference from {baseline}, seed by seed (paired)",
        _table(["arm", "figure", *seed_titles, "mean"], _difference_rows(figures, baseline, seeds)),
        "Cells",
        _table(["arm", *seed_titles], ([arm, *(links[cells[arm][seed]] for seed in seeds)] for arm in arms)),
    ]
    if len(arms) == 1:  # nothing to compare with
        del parts[2:4]
    if any(len(seeds_done) == 1 for values in figures.values() for seeds_done in values.values()):
        parts.insert(0, "A mean of n=1 has no interval: one seed does not say how far seeds differ.")
    return "\n\n".join(parts) + "\n"


def _difference_rows(figures: Mapping[str, Values], baseline: str, seeds: Sequence[int]) -> Iterable[list[str]]:
    for name, values in figures.items():
        for arm in values:
            if arm != baseline:
                differences = paired_differences(values[arm], values[baseline])
                shown = (f"{differences[seed]:+.3f}" if seed in differences else "-" for seed in seeds)
                yield [arm, f"`{name}`", *shown, _with_n(t_ci([*differences.values()]), signed=True)]


def _with_n(figure: Figure, signed: bool = False) -> str:
    return f"{show_figure(figure, signed)} (n={figure['n']})"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))


def to_csv(figures: Mapping[str, Values], baseline: str, cells: Cells) -> str:
    """The same numbers in full precision, one a row: COLUMNS.

    `quantity` is `value` or `difference` (of one seed), `mean` or `mean_difference` (over seeds, with interval).
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, values in figures.items():
        for arm, by_seed in values.items():
            writer.writerows(_csv_rows(arm, name, "value", "mean", by_seed, cells[arm]))
            if arm != baseline:
                differences = paired_differences(by_seed, values[baseline])
                writer.writerows(_csv_rows(arm, name, "difference", "mean_difference", differences, cells[arm]))
    return file.getvalue()


def _csv_rows(
    arm: str, name: str, single: str, mean: str, by_seed: Mapping[int, float], paths: Mapping[int, str]
) -> Iterable[list]:
    for seed, value in by_seed.items():
        yield [arm, name, single, seed, value, None, None, 1, paths[seed]]
    figure = t_ci([*by_seed.values()])
    yield [arm, name, mean, None, figure["mean"], *figure["ci95"], figure["n"], None]
