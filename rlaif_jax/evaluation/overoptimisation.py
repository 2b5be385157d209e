"""Over-optimisation: what best of n and RL gain by the proxy that they follow and by a gold reward that they do not.

The laws of Gao, Schulman and Hilton (arXiv 2210.10760, section 3): with d the square root of the KL from the initial
policy (nats), best of n gains d (alpha - beta d), and RL gains d (alpha - beta log d). Both are linear in alpha and
beta, so ordinary least squares fits them, and every fit of a resampling is one product with the same matrix.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

UNKNOWN = {"mean": None, "ci95": [None, None], "n": 0}


def best_of_n(proxy: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The expected value of the reply that the proxy likes best among n, without bias: [prompts] float64.

    The mean over all n-subsets of a prompt's N replies, in closed form (Coste et al., arXiv 2310.02743, after Nakano et
    al., arXiv 2112.09332, appendix I): with replies sorted by proxy, ascending, the i-th is the best of C(i-1, n-1)
    of the C(N, n) subsets. Replies of equal proxy share their weights evenly, as if the best were drawn among them.

    proxy, values: [prompts, N], finite; 1 <= n <= N.
    """
    total = proxy.shape[1]
    # C(i, n) / C(N, n) for i from N down to 0: the share of subsets that lie within the lowest i.
    places = np.arange(total, 0, -1)
    within = np.cumprod(np.concatenate([[1.0], np.maximum(places - n, 0) / places]))[::-1]
    first = stats.rankdata(proxy, method="min", axis=1).astype(int) - 1
    last = stats.rankdata(proxy, method="max", axis=1).astype(int)
    weights = (within[last] - within[first]) / (last - first)
    return np.sum(weights * values, axis=1)


def best_of_n_kl(n: int) -> float:
    """KL of best of n from the policy that it samples: log n - (n - 1) / n, in nats.

    (Stiennon et al., arXiv 2009.01325, appendix G.3; an upper bound where replies repeat, Beirami et al., 2401.01879.)
    """
    return float(np.log(n) - (n - 1) / n)


def fit_best_of_n(distances: np.ndarray, gains: np.ndarray, resamples: int, seed: int) -> dict:
    """Fits d (alpha - beta d) to the mean gains of best of n; intervals resample prompts.

    The points share their replies, so their errors are correlated and no error model of single points would hold;
    drawing whole prompts keeps that, and needs no weights.

    distances: [points], above 0; gains: [prompts, points], each prompt's gain over n = 1.

    Returns `_fitted`'s figures.
    """
    design = np.stack([distances, -(distances**2)], axis=1)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=resamples) @ gains / len(gains)
    fitted = _fitted(design, gains.mean(axis=0), draws, distances, len(gains))
    return fitted | _peak(fitted, lambda alpha, beta: alpha / (2 * beta), distances)


def fit_rl(distances: np.ndarray, gains: np.ndarray, resamples: int, seed: int) -> dict:
    """Fits offset + d (alpha - beta log d) to the iterations of one RL run; intervals resample blocks of residuals.

    The law has no offset. But gains are taken from the first iteration, whose mean over one batch is noisy, and that
    noise moves all the others together: without an offset it would bend the curve.

    Iterations are resampled as a moving-block bootstrap of residuals (Künsch, 1989), in blocks of n^(1/3) around a
    circle: distances stay as they are, for the few small ones carry the fit; neighbours stay together, for what the law
    misses of a run it misses in a row, and single residuals would call the fit surer than it is. The intervals are of
    this run's curve: another seed is another curve.

    distances: [iterations], 0 or more; gains: [iterations].

    Returns `_fitted`'s figures.
    """
    logs = np.log(np.where(distances > 0, distances, 1.0))  # d log d is 0 at 0
    design = np.stack([distances, -distances * logs, np.ones_like(distances)], axis=1)
    fit, *_ = np.linalg.lstsq(design, gains, rcond=None)
    residuals, n = gains - design @ fit, len(gains)
    block = max(round(n ** (1 / 3)), 1)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, max(n, 1), (resamples, -(-n // block)))
    rows = ((starts[:, :, None] + np.arange(block)) % max(n, 1)).reshape(resamples, -1)[:, :n]
    fitted = _fitted(design, gains, design @ fit + residuals[rows], distances, n)
    return fitted | _peak(fitted, lambda alpha, beta: np.exp(alpha / beta - 1), distances)


def curve_best_of_n(distances: np.ndarray, fit: dict) -> np.ndarray:
    """The fitted gains of best of n at some distances, of the same shape."""
    return distances * (fit["alpha"]["mean"] - fit["beta"]["mean"] * distances)


def curve_rl(distances: np.ndarray, fit: dict) -> np.ndarray:
    """The fitted gains of RL over its first iteration at some distances, of the same shape."""
    logs = np.log(np.where(distances > 0, distances, 1.0))
    return fit["offset"]["mean"] + distances * (fit["alpha"]["mean"] - fit["beta"]["mean"] * logs)


def early_stop(kl: Sequence[float], fit: dict) -> dict:
    """Where RL should have stopped: the first iteration whose KL passes that of the peak.

    kl: [iterations], nats a response. Returns `early_stop`, the iteration or None, and `early_stop_reason`, why None.
    """
    if fit["peak"]["mean"] is None:
        return {"early_stop": None, "early_stop_reason": f"no peak: {fit['peak_reason']}"}
    passed = np.flatnonzero(np.asarray(kl) >= fit["peak"]["mean"] ** 2)
    return {"early_stop": int(passed[0]), "early_stop_reason": None}


_COEFFICIENTS = ("alpha", "beta", "offset")


def _fitted(design: np.ndarray, gains: np.ndarray, draws: np.ndarray, distances: np.ndarray, n: int) -> dict:
    """`alpha`, `beta` and, where the design has it, `offset` as figures of n; `r_squared`; the coefficients' draws.

    All are null where there are too few different distances to tell them apart. draws: [resamples, points].
    """
    columns = design.shape[1]
    if len(np.unique(distances)) <= columns or np.linalg.matrix_rank(design) < columns:
        return dict.fromkeys(_COEFFICIENTS[:columns], UNKNOWN | {"n": n}) | {"r_squared": None}
    solve = np.linalg.pinv(design)  # [coefficients, points]
    coefficients, resampled = solve @ gains, draws @ solve.T
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
    spread = np.sum((gains - gains.mean()) ** 2)
    figures = {
        name: {"mean": float(coefficients[i]), "ci95": [float(low[i]), float(high[i])], "n": n}
        for i, name in enumerate(_COEFFICIENTS[:columns])
    }
    r_squared = float(1 - np.sum((gains - design @ coefficients) ** 2) / spread) if spread else None
    return figures | {"r_squared": r_squared, "draws": resampled}


def _peak(fitted: dict, place, distances: np.ndarray) -> dict:
    """The distance at which the gain is highest, as a figure, and where there is none to be named, why.

    A draw that goes on rising, or peaks beyond what was seen, counts as the end of the range.
    """
    draws, alpha, beta = fitted.pop("draws", None), fitted["alpha"], fitted["beta"]
    unknown = UNKNOWN | {"n": alpha["n"]}
    if draws is None:
        return {"peak": unknown, "peak_reason": "there are too few different distances to fit the law to"}
    if beta["ci95"][0] <= 0:
        return {"peak": unknown, "peak_reason": "the interval of beta is not above 0: the fitted law does not turn"}
    peak, farthest = float(place(alpha["mean"], beta["mean"])), float(distances.max())
    if not 0 < peak < farthest:
        side = "beyond" if peak >= farthest else "before"
        return {"peak": unknown, "peak_reason": f"the fitted peak, {peak:.3g}, is {side} the distances seen"}
    turning = draws[:, 1] > 0
    with np.errstate(over="ignore"):
        places = place(draws[:, 0], np.where(turning, draws[:, 1], 1.0))
    places = np.where(turning, np.clip(places, 0, farthest), farthest)
    low, high = np.percentile(places, (2.5, 97.5))
    return {"peak": {"mean": peak, "ci95": [float(low), float(high)], "n": alpha["n"]}, "peak_reason": None}
