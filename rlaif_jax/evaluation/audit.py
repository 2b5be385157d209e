"""What a label file says of its judge: the slot, the length, the form and the author that it prefers; how far people
agree, and how truly it states its confidence. Every figure with its 95 % interval and n.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlaif_jax.evaluation.calibration import (
    cross_fitted,
    expected_calibration_error,
    fit_temperature,
    logit,
    reliability,
)
from rlaif_jax.evaluation.statistics import Figure, bootstrap_ci, mean_ci

_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S|^#{1,6} |\*\*\S", re.MULTILINE)
MIN_GROUP = 10  # pairs of a group that is reported by itself
_BANDS = (0.5, 0.6, 0.75, 0.9, 1.0)  # of the judge's confidence in the side that it prefers

Columns = Mapping[str, Sequence[Any]]


def audit(columns: Columns, resamples: int, seed: int, by: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of a label file's scored rows.

    columns: of the label store, and where known `human` (what people say of a: 1 or 0; null where they say nothing),
    `generator_a` and `generator_b` (who wrote the responses), and those in `by`, by whose values agreement is split.
    A figure that the columns can't give is left out.
    """
    ok = np.array(columns["status"]) == "ok"
    rows = {name: [value for value, kept in zip(values, ok, strict=True) if kept] for name, values in columns.items()}
    prob_a = np.array(rows["prob_a"], float)

    def mean(values) -> Figure:
        return mean_ci(values, resamples, seed)

    figures: dict[str, Any] = {"scored": mean(ok)}
    if not len(prob_a):
        return figures
    figures |= slots(rows, mean) | _length(rows, prob_a, mean, resamples, seed)
    listed = _sides(rows, lambda text: bool(_LIST.search(text)))
    figures["list_preferred"] = mean(_prefers(prob_a, listed))
    if any(rows.get("generator_a", ())):
        own = [str(name).lower() for name in rows["judge"]]
        figures["self_preferred"] = mean(_prefers(prob_a, _own(rows, own)))
    mass = [value for value in rows.get("answer_mass", ()) if value is not None]
    figures["answer_mass"] = mean(mass)
    if "human" in rows:
        figures |= _people(rows, prob_a, mean, resamples, seed, by)
    return figures


def slots(rows: Columns, mean: Callable) -> dict[str, Figure]:
    """Position bias (arXiv 2309.00267, section 4.3); nothing where responses are rated by themselves."""
    if rows["prob_a_forward"][0] is None:
        return {}
    forward, backward = (np.array(rows[f"prob_a_{order}"], float) for order in ("forward", "reversed"))
    # A pair is one observation; a sits in slot 2 when reversed.
    same = np.sign(forward - 0.5) * np.sign(0.5 - backward)
    return {
        "first_slot_rate": mean((share_a(forward) + share_a(1 - backward)) / 2),
        "same_slot_in_both_orders": mean((1 + same) / 2),
        "first_slot_when_same": mean(share_a(forward)[same > 0]),
    }


def _length(rows: Columns, prob_a: np.ndarray, mean: Callable, resamples: int, seed: int) -> dict[str, Figure]:
    """How often the longer response is preferred, and how much each 100 characters more add to the log-odds."""
    longer = np.array([len(a) - len(b) for a, b in zip(rows["response_a"], rows["response_b"], strict=True)], float)
    figures = {"longer_preferred": mean(_prefers(prob_a, np.sign(longer)))}
    if np.ptp(longer) > 0:
        # Both orders of a pair are one observation: without an intercept, swapping a and b changes nothing.
        slope = lambda x, y: float(x @ y / (x @ x)) if x @ x else 0.0  # noqa: E731
        figures["length_slope"] = bootstrap_ci((longer / 100, logit(prob_a, 1e-6)), slope, resamples, seed)
    return figures


def _people(
    rows: Columns, prob_a: np.ndarray, mean: Callable, resamples: int, seed: int, by: Sequence[str]
) -> dict[str, Any]:
    """Agreement with people, over all, by the judge's confidence and by columns; and calibration against them."""
    human = np.array([np.nan if value is None else value for value in rows["human"]], float)
    said = np.isfinite(human) & (human != 0.5)
    human, prob_a = human[said], prob_a[said]
    if not len(human):
        return {}
    agrees, confidence = agreement(prob_a, human), np.maximum(prob_a, 1 - prob_a)
    lengths = np.array([len(a) - len(b) for a, b in zip(rows["response_a"], rows["response_b"], strict=True)])[said]
    calibrated, error = cross_fitted(prob_a, human), expected_calibration_error
    figures = {
        "judge_agreement/human": mean(agrees),
        "judge_kappa/human": bootstrap_ci((prob_a, human), kappa, resamples, seed),
        "longer_agreement/human": mean(agreement(0.5 + 0.5 * np.sign(lengths), human)),
        "calibration/ece": bootstrap_ci((prob_a, human), error, resamples, seed, centred=True),
        "calibration/brier": mean((prob_a - human) ** 2),
        "calibration/ece_after_scaling": bootstrap_ci((calibrated, human), error, resamples, seed, centred=True),
        "calibration/brier_after_scaling": mean((calibrated - human) ** 2),
        "calibration/temperature": fit_temperature(prob_a, human),
        "calibration/reliability": reliability(prob_a, human),
    }
    for low, high in itertools.pairwise(_BANDS):
        band = (confidence >= low) & ((confidence < high) | (high == 1.0))
        if band.any():
            figures[f"judge_agreement/human/confidence {low:.2f} to {high:.2f}"] = mean(agrees[band])
    for name in by:
        values = np.array([str(value) for value in rows[name]])[said]
        for value in np.unique(values):
            if np.sum(values == value) >= MIN_GROUP:
                figures[f"judge_agreement/human/{name}={value}"] = mean(agrees[values == value])
    return figures


def kappa(prob_a: np.ndarray, human: np.ndarray) -> float:
    """Cohen's kappa of judge and people (1960): agreement beyond chance, which is a half.

    Which response is called a says nothing, and in some sets it is always the chosen one: each pair counts both ways
    round, so that either side is taken equally often.
    """
    return float(2 * np.mean(agreement(prob_a, human)) - 1)


def agreement(preference_a: np.ndarray, label_a: np.ndarray) -> np.ndarray:
    """1 where both are on one side of 0.5, 0 where they are not, 0.5 where one is on none: [rows] float."""
    return (1 + np.sign(preference_a - 0.5) * np.sign(label_a - 0.5)) / 2


def share_a(prob: np.ndarray) -> np.ndarray:
    """How often a is named: 1 where it is above a half, 0 below, 0.5 at it."""
    return 0.5 + 0.5 * np.sign(prob - 0.5)


def _prefers(prob_a: np.ndarray, side: np.ndarray) -> np.ndarray:
    """For rows of which one response has a quality (side 1: a has it, -1: b has it): whether it is preferred."""
    return share_a(np.where(side > 0, prob_a, 1 - prob_a))[side != 0]


def _sides(rows: Columns, has: Callable[[str], bool]) -> np.ndarray:
    pairs = zip(rows["response_a"], rows["response_b"], strict=True)
    return np.array([int(has(a)) - int(has(b)) for a, b in pairs])


def _own(rows: Columns, judges: Sequence[str]) -> np.ndarray:
    """Which response the judge itself wrote."""
    generators = zip(judges, rows["generator_a"], rows["generator_b"], strict=True)
    return np.array([int(str(a).lower() == judge) - int(str(b).lower() == judge) for judge, a, b in generators])
