"""The page on over-optimisation: proxy and gold against the square root of KL, of best of n and of RL."""

from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np
from etils import epath
from markupsafe import Markup

from rlaif_jax.evaluation.overoptimisation import curve_best_of_n, curve_rl
from rlaif_jax.reporting import charts
from rlaif_jax.reporting.words import figure_cell, number

_FOLDER = epath.Path(__file__).parent
_METHODS = {"best_of_n": ("Best of n", curve_best_of_n), "rl": ("RL", curve_rl)}
_REWARDS = {"proxy": "proxy", "gold": "gold"}
_DRAWN = 100  # points of a fitted curve


def render_overoptimisation(
    name: str, results: Mapping[str, Any], best_of_n: Mapping[str, Any], rl: Mapping[str, Any]
) -> str:
    """The HTML of the page of the run `name`, in ASCII.

    best_of_n, rl: what is drawn: `distances` [points], and of `proxy` and `gold` each `points` (figures) and `fit`.
    """
    curves = {"best_of_n": best_of_n, "rl": rl}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    html = environment.get_template("overoptimisation.html.j2").render(
        name=name,
        style=Markup((_FOLDER / "report.css").read_text()),
        charts=[(_METHODS[method][0], _chart(method, curve)) for method, curve in curves.items()],
        rows=[_row(method, reward, results) for method in _METHODS for reward in _REWARDS],
        points=_points(results),
        stop=results["rl/early_stop"],
        stop_reason=results["rl/early_stop_reason"],
        peaks=[(_METHODS[method][0], results[f"{method}/gold/peak"]["mean"], results[f"{method}/gold/peak_reason"])
               for method in _METHODS],
        prompts=results["best_of_n/prompts"],
        unscored=results["best_of_n/prompts_unscored"],
        iterations=results["rl/iterations"],
    )  # fmt: skip
    return html.encode("ascii", "xmlcharrefreplace").decode()


def _chart(method: str, curve: Mapping[str, Any]) -> Markup | None:
    distances, fits = np.asarray(curve["distances"], float), {}
    if not len(distances):
        return None
    title, law = _METHODS[method]
    x = np.linspace(0, distances.max(), _DRAWN)
    for reward in _REWARDS:
        fit = curve[reward]["fit"]
        fits[reward] = None if fit["alpha"]["mean"] is None else law(x, fit)
    points = {reward: curve[reward]["points"] for reward in _REWARDS}
    peak = curve["gold"]["fit"]["peak"]["mean"]
    return charts.overoptimisation(f"over-optimisation: {title}", distances, points, x, fits, peak)


def _row(method: str, reward: str, results: Mapping[str, Any]) -> dict:
    figures = {part: results[f"{method}/{reward}/{part}"] for part in ("alpha", "beta", "peak")}
    r_squared = results[f"{method}/{reward}/r_squared"]
    return {
        "label": f"{_METHODS[method][0]}, {reward}",
        "cells": [figure_cell(False, figure) for figure in figures.values()],
        "r_squared": "-" if r_squared is None else number(r_squared),
        "n": figures["alpha"]["n"],
    }


def _points(results: Mapping[str, Any]) -> list[dict]:
    """The gains of best of n, a row a number."""
    numbers = [int(name.split("/")[2]) for name in results if name.startswith("best_of_n/gold/") and name[-1].isdigit()]
    return [
        {"n": n, "cells": [figure_cell(False, results[f"best_of_n/{reward}/{n}"]) for reward in _REWARDS]}
        for n in numbers
    ]
