"""A panel of judges on the same pairs: their labels combined, how far they disagree, and what each of them adds.

Everywhere prob_a is [members, pairs] float64: each member's probability that response a is the better one, NaN where it
could not score the pair.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlaif_jax.evaluation.audit import agreement
from rlaif_jax.evaluation.statistics import Figure, bootstrap_ci, mean_ci

RULES = ("mean", "majority", "minimum")
KNOWN = ("ground_truth", "human")  # columns that say which response is better: 1 for a, 0 for b


def enough(prob_a: np.ndarray) -> np.ndarray:
    """Whether a pair has a label: more than half of the members, and at least two where there are two, scored it.

    prob_a: [members, pairs], NaN where a member did not. Returns [pairs] bool.
    """
    scored = np.isfinite(prob_a).sum(axis=0)
    return (scored >= min(2, len(prob_a))) & (2 * scored > len(prob_a))


def combine(prob_a: np.ndarray, rule: str) -> np.ndarray:
    """The panel's probability that a is better, from the members that scored a pair; [pairs], NaN where none did.

    "mean": their mean. "majority": the share of them that name a, 0.5 counted half. "minimum": on the side of the mean,
    the least that any of them gives to that side; where one is of the other side 0.5, no preference.
    """
    if rule == "majority":
        return mean(_votes(prob_a))
    label = mean(prob_a)
    if rule == "mean":
        return label
    side = np.sign(label - 0.5)  # 0 leaves 0.5, and NaN stays
    margin = np.min(np.where(np.isfinite(prob_a), side * (prob_a - 0.5), np.inf), axis=0)
    return 0.5 + side * np.maximum(margin, 0)


def disagreement(prob_a: np.ndarray) -> np.ndarray:
    """The population variance of the members' probabilities: [pairs], from 0 to 0.25; NaN where none has one."""
    return mean((prob_a - mean(prob_a)) ** 2)


def vote_entropy(prob_a: np.ndarray) -> np.ndarray:
    """The entropy of the vote for a or b, 0.5 counted half to each: [pairs], from 0 to log 2 nats."""
    share = combine(prob_a, "majority")
    shares = np.stack([share, 1 - share])
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(shares == 0, 0, shares * np.log(shares)).sum(axis=0) + 0.0  # not -0


def trust(variance: np.ndarray, how: str, limit: float) -> np.ndarray:
    """How much each pair counts in training by the `disagreement` of its label: [pairs], from 0 to 1.

    "weight": 1 less the share that the variance is of the largest there can be, 0.25. "filter": 0 above `limit`.
    """
    if how == "filter":
        return (variance <= limit).astype(float)
    return np.clip(1 - 4 * variance, 0, 1)


def mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The mean over the members that have a value: [pairs], NaN where none has. weights: [members], alike without."""
    known = np.isfinite(values)
    counted = known if weights is None else known * weights[:, None]
    with np.errstate(invalid="ignore"):
        return (np.where(known, values, 0) * counted).sum(axis=0) / counted.sum(axis=0)


def _votes(prob_a: np.ndarray) -> np.ndarray:
    """1 for a, 0 for b, 0.5 for neither; NaN stays."""
    return 0.5 + 0.5 * np.sign(prob_a - 0.5)


def krippendorff_alpha(values: np.ndarray, nominal: bool) -> float:
    """Krippendorff's alpha: agreement of raters beyond chance, 1 - observed / expected disagreement.

    (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, section C and on.) Units with fewer than two
    values say nothing. 0 where there is no variation: nothing then shows that values depend on what is rated.

    values: [raters, units], NaN where missing. nominal: equal values agree, others do not; else the interval metric,
    the squared difference.
    """
    return _alpha(*_by_unit(values, nominal))


def _by_unit(values: np.ndarray, nominal: bool) -> tuple[np.ndarray, ...]:
    """Of the units with two values or more, what alpha is made of: number, disagreement, sum of squares, sums.

    A nominal value is a vector of 0 and 1 at its category: the squared distance of two that differ is 2, and constant
    factors of the metric cancel in alpha. Sums over all pairs of values come from sums of values and of squares.
    """
    values = values[:, np.isfinite(values).sum(axis=0) >= 2]
    known = np.isfinite(values)
    if nominal:
        vectors = (values[..., None] == np.unique(values[known])).astype(float)
    else:
        # Close to 0, where sums of squares lose nothing to rounding.
        vectors = np.where(known, values - (values[known].mean() if known.any() else 0), 0)[..., None]
    number, sums, squares = known.sum(axis=0), vectors.sum(axis=0), (vectors**2).sum(axis=(0, 2))
    observed = (number * squares - (sums**2).sum(axis=1)) / (number - 1)
    return number, observed, squares, sums


def _alpha(number: np.ndarray, observed: np.ndarray, squares: np.ndarray, sums: np.ndarray) -> float:
    n = number.sum()
    expected = (n * squares.sum() - (sums.sum(axis=0) ** 2).sum()) / max(n - 1, 1)
    return float(1 - observed.sum() / expected) if expected > 1e-12 * n else 0.0


def _alpha_ci(values: np.ndarray, nominal: bool, resamples: int, seed: int) -> Figure:
    parts = _by_unit(values, nominal)
    return bootstrap_ci(parts, _alpha, resamples, seed) if len(parts[0]) else mean_ci([], resamples, seed)


def alphas(prob_a: np.ndarray, resamples: int, seed: int) -> dict[str, Figure]:
    """Krippendorff's alpha of the votes for a or b, and of the probabilities, by bootstrap over pairs."""
    return {
        "alpha/votes": _alpha_ci(_votes(prob_a), True, resamples, seed),
        "alpha/prob_a": _alpha_ci(prob_a, False, resamples, seed),
    }


def panel_audit(columns: Mapping[str, Sequence[Any]], resamples: int, seed: int) -> dict[str, Figure]:
    """The figures of a panel's label file, intervals by bootstrap over its scored pairs; none of another label file.

    columns: as of `evaluation.audit.audit`; `prob_a_members` (name -> probability) and `combine` are the panel's, and
    `human` and `ground_truth` may say which response is better (1 for a, 0 for b; null or 0.5 where they do not).

    `panel_alpha/...` is Krippendorff's alpha of all members; `panel_without/NAME/...` is what the panel of the others
    is like, `panel_member/NAME/...` that member by itself, `with_others` its agreement with the panel of the others.
    """
    rows = [i for i, status in enumerate(columns["status"]) if status == "ok"]
    if not rows or columns.get("prob_a_members", [None])[0] is None:
        return {}
    members, rule = [columns["prob_a_members"][i] for i in rows], columns["combine"][0]
    names = list(members[0])
    if len(names) < 2:  # who labels is only not who evaluates: there is nobody to agree with
        return {}
    prob_a = np.array([[row[name] for row in members] for name in names], float)
    known = {name: np.array([columns[name][i] for i in rows], float) for name in KNOWN if name in columns}

    def mean_of(values) -> Figure:
        return mean_ci(values, resamples, seed)

    def agreements(label: np.ndarray) -> dict[str, Figure]:
        return {name: mean_of(_agreement(label, better)) for name, better in known.items()}

    figures = {f"panel_{name}": figure for name, figure in alphas(prob_a, resamples, seed).items()}
    figures["panel_disagreement/variance"] = mean_of(disagreement(prob_a))
    figures["panel_disagreement/vote_entropy"] = mean_of(vote_entropy(prob_a))
    for i, name in enumerate(names):
        others = np.delete(prob_a, i, axis=0)
        label = combine(others, rule)
        without = alphas(others, resamples, seed) if len(others) > 1 else {}
        alone = {"scored": mean_of(np.isfinite(prob_a[i])), "with_others": mean_of(_agreement(label, prob_a[i]))}
        figures |= {f"panel_without/{name}/{key}": figure for key, figure in (without | agreements(label)).items()}
        figures |= {f"panel_member/{name}/{key}": figure for key, figure in (alone | agreements(prob_a[i])).items()}
    return figures


def _agreement(label: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Their agreement where both have a value and the other names a side."""
    compared = np.isfinite(label) & np.isfinite(other) & (other != 0.5)
    return agreement(label[compared], other[compared])
