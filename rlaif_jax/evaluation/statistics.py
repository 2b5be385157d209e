"""Figures with their uncertainty: a mean, its 95 % interval, and the number of observations."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

Figure = dict[str, object]


def mean_ci(values: np.ndarray | Sequence[float], resamples: int, seed: int) -> Figure:
    """The mean with a percentile-bootstrap 95 % interval.

    values: [n], numbers or booleans. With n = 0 mean and interval are null.
    """
    values = np.asarray(values, float)
    if len(values) == 0:
        return {"mean": None, "ci95": [None, None], "n": 0}
    interval = [float(values.mean())] * 2  # of one observation, or of n equal ones
    if len(values) > 1 and np.ptp(values) > 0:
        rng = np.random.default_rng(seed)
        result = stats.bootstrap((values,), np.mean, n_resamples=resamples, method="percentile", rng=rng)
        interval = [float(x) for x in result.confidence_interval]
    return {"mean": float(values.mean()), "ci95": interval, "n": len(values)}


def bootstrap_ci(
    arrays: Sequence[np.ndarray], statistic: Callable[..., float], resamples: int, seed: int, centred: bool = False
) -> Figure:
    """A statistic of paired observations with a percentile-bootstrap 95 % interval.

    arrays: each [n], resampled together; `statistic` takes them in their order. Needs n > 0.
    centred: for statistics that resampling pushes up, e.g. the size of errors: the interval is moved by the mean push,
    and does not go below 0.
    """
    arrays, n = [np.asarray(array, float) for array in arrays], len(arrays[0])
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, n, n) for _ in range(resamples))
    values = [statistic(*(array[rows] for array in arrays)) for rows in draws]
    mean, (low, high) = float(statistic(*arrays)), np.percentile(values, (2.5, 97.5))
    if centred:
        low, high = (max(x - np.mean(values) + mean, 0.0) for x in (low, high))
    return {"mean": mean, "ci95": [float(low), float(high)], "n": n}


def t_ci(values: np.ndarray | Sequence[float]) -> Figure:
    """The mean with Student's t 95 % interval: for a few independent repetitions, e.g. the seeds of an experiment.

    values: [n]. With n = 1 the interval is null: one value says nothing about the spread. With n = 0 the mean is, too.
    """
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return {"mean": float(values[0]) if n else None, "ci95": [None, None], "n": n}
    mean, half = float(values.mean()), float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": n}


def paired_differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """`values` less `baseline`, key by key; a key that only one of them has is left out."""
    return {key: values[key] - baseline[key] for key in values if key in baseline}


def show_figure(figure: Figure, signed: bool = False) -> str:
    """A figure as text: its mean and, where there is one, its interval; "-" without observations."""
    sign = "+" if signed else ""
    mean, (low, high) = figure["mean"], figure["ci95"]
    if mean is None:
        return "-"
    return f"{mean:{sign}.3f}" + ("" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def jackknife_ci(items: Sequence, statistic: Callable[[Sequence], float]) -> Figure:
    """A statistic of the whole set with a jackknife 95 % interval.

    For statistics that count distinct things, which a bootstrap's repeated items would bias (Efron, 1979).
    Needs at least two items.
    """
    n, value = len(items), statistic(items)
    left_out = np.array([statistic([*items[:i], *items[i + 1 :]]) for i in range(n)])
    error = np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))
    return {"mean": value, "ci95": [value - 1.96 * error, value + 1.96 * error], "n": n}


def wilson_ci(successes: int, n: int) -> Figure:
    """A proportion with Wilson's 95 % interval (1927), which holds for few trials and near 0 and 1. Needs n > 0."""
    interval = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return {"mean": successes / n, "ci95": [float(interval.low), float(interval.high)], "n": n}


def difference(new: Figure, old: Figure) -> Figure:
    """`new` - `old` with a 95 % interval from those of the two (Zou and Donner, 2008), as if they were independent.

    Where both are of the same prompts they mostly rise and fall together, and the interval is wider than it need be.
    """
    (low, high), (old_low, old_high) = new["ci95"], old["ci95"]
    mean = new["mean"] - old["mean"]
    below = np.hypot(new["mean"] - low, old_high - old["mean"])
    above = np.hypot(high - new["mean"], old["mean"] - old_low)
    return {"mean": mean, "ci95": [float(mean - below), float(mean + above)], "n": min(new["n"], old["n"])}


def cohen_kappa(labels: np.ndarray, others: np.ndarray) -> float:
    """Agreement of two raters beyond chance, which their own shares of each label make (Cohen, 1960).

    labels, others: of one shape, any number of kinds. Where both give all one and the same label it is NaN.
    """
    kinds = np.union1d(labels, others)
    chance = sum(np.mean(labels == kind) * np.mean(others == kind) for kind in kinds)
    return float((np.mean(labels == others) - chance) / (1 - chance)) if chance < 1 else float("nan")


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all word bigrams (Li et al., arXiv 1510.03055); 0 where there are none."""
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]  # noqa: B905
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def most_common_share(texts: Sequence[str]) -> float:
    """The share of the most frequent text: how far a policy has collapsed onto one reply."""
    return max(texts.count(text) for text in set(texts)) / len(texts)
