"""Figures by round, of one run or of several: a picture of small charts, and a table."""

import io
import re
from collections.abc import Mapping

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from rlaif_jax.evaluation.statistics import Figure, show_figure

# Figures by round, NAME/roundK or NAME/roundK_vs_sft, in the order of reading; those that no run has are left out.
_TITLES = {
    "ground_truth_good": "good replies, by the ground truth",
    "win_rate": "win rate over SFT, by who evaluates",
    "proxy_win_rate": "win rate over SFT, by who labels",
    "judge_agreement": "who labels agrees with who evaluates",
    "label_agreement": "labels agree with the ground truth",
    "distinct_2": "distinct bigrams",
    "most_common_reply": "most common reply",
    "entropy": "entropy, nats a token",
    "response_length": "response length, tokens",
    "kl": "KL from SFT, nats a reply",
}
_CHANCE = {"win_rate": 0.5, "proxy_win_rate": 0.5}
_ROUND = re.compile(r"(\w+)/round(\d+)(?:_vs_sft)?")
_COLUMNS = 3

Series = dict[str, dict[int, Figure]]  # name -> round -> figure


def series(results: Mapping[str, object]) -> Series:
    """The figures by round among those of a run."""
    found: Series = {}
    for name, figure in results.items():
        match = _ROUND.fullmatch(name)
        if match and isinstance(figure, dict) and figure["mean"] is not None:
            found.setdefault(match[1], {})[int(match[2])] = figure
    return {name: dict(sorted(found[name].items())) for name in _TITLES if name in found}


def draw_rounds(runs: Mapping[str, Mapping[str, object]]) -> str:
    """An SVG of small charts, a figure each, a line a run with 95 % intervals, broken where a round has no figure.

    Round 0 is the SFT policy.
    """
    found = {run: series(results) for run, results in runs.items()}
    names = [name for name in _TITLES if any(name in each for each in found.values())]
    rows = -(-len(names) // _COLUMNS)
    with matplotlib.style.context(["default", {"svg.hashsalt": "rounds", "font.size": 8, "axes.grid": True}]):
        canvas = Canvas(figsize=(3.2 * _COLUMNS, 2.3 * rows + 0.3), layout="constrained")
        FigureCanvasSVG(canvas)
        panels = canvas.subplots(rows, _COLUMNS, squeeze=False).ravel()
        for axes, name in zip(panels, names, strict=False):
            for i, (run, each) in enumerate(found.items()):
                if name in each:
                    _line(axes, each[name], run, f"C{i}", 0.06 * (i - (len(found) - 1) / 2))
            if name in _CHANCE:
                axes.axhline(_CHANCE[name], color="grey", linewidth=0.8, linestyle="--")
            axes.set_title(_TITLES[name], fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        drawn = {run: line for axes in panels for line, run in zip(*axes.get_legend_handles_labels(), strict=True)}
        canvas.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=len(found))
        canvas.supxlabel("round (0 is SFT)", fontsize=8)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _line(axes, figures: Mapping[int, Figure], label: str, color: str, shift: float) -> None:
    rounds = np.arange(min(figures), max(figures) + 1)
    nothing = {"mean": np.nan, "ci95": (np.nan, np.nan)}
    found = [figures.get(number, nothing) for number in rounds]
    means = np.array([figure["mean"] for figure in found])
    intervals = np.array([figure["ci95"] for figure in found], float).T  # NaN of a single seed
    errors = np.nan_to_num(np.abs(intervals - means))
    axes.errorbar(rounds + shift, means, errors, marker="o", markersize=3.5, linewidth=1.2,
                  elinewidth=0.8, label=label, color=color)  # fmt: skip


def table(runs: Mapping[str, Mapping[str, object]]) -> str:
    """Markdown: a row a figure and round, a column a run."""
    found = {run: series(results) for run, results in runs.items()}
    lines = [f"| | round | {' | '.join(found)} |", "|---" * (len(found) + 2) + "|"]
    for name, title in _TITLES.items():
        for number in sorted({number for each in found.values() for number in each.get(name, ())}):
            figures = (each.get(name, {}).get(number) for each in found.values())
            cells = (f"{show_figure(figure)} (n={figure['n']})" if figure else "-" for figure in figures)
            lines.append(f"| {title} | {number} | {' | '.join(cells)} |")
    return "\n".join(lines)
