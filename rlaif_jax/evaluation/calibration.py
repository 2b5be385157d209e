"""How far probabilities can be taken at their word, and the temperature that makes them truer."""

import numpy as np
from scipy import optimize

BINS = 10


def expected_calibration_error(prob: np.ndarray, outcome: np.ndarray, bins: int = BINS) -> float:
    """The gap between confidence and accuracy, averaged over bins of equal count (Guo et al., arXiv 1706.04599).

    prob: [n] of an outcome in [0, 1]; outcome: [n], what came of it. Bins are of the confidence in the likelier side,
    so that swapping both sides of any pair changes nothing.
    """
    confidence, correct = _confident(prob, outcome)
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return float(sum(abs(np.sum(confidence[part] - correct[part])) for part in parts) / len(order))


def reliability(prob: np.ndarray, outcome: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, share of right answers, pairs) of bins of equal count, the least confident first."""
    confidence, correct = _confident(prob, outcome)
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return [(float(confidence[part].mean()), float(correct[part].mean()), len(part)) for part in parts]


def _confident(prob: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the likelier side, and how far that side was right; of an even pair, half."""
    right = np.where(prob > 0.5, outcome, 1 - outcome)
    return np.maximum(prob, 1 - prob), np.where(prob == 0.5, 0.5, right)


def fit_temperature(prob: np.ndarray, outcome: np.ndarray) -> float:
    """The temperature in [0.05, 100] under which `scale` makes the outcomes likeliest."""
    logits = logit(prob)

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0, scaled) - outcome * scaled))

    return float(np.exp(optimize.minimize_scalar(loss, bounds=np.log((0.05, 100.0)), method="bounded").x))


def scale(prob: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities whose log-odds are divided by the temperature; 1 changes nothing."""
    return prob if temperature == 1 else 1 / (1 + np.exp(-logit(prob) / temperature))


def cross_fitted(prob: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Probabilities scaled by a temperature that was fitted on the other half of the pairs: [n]."""
    scaled, odd = np.array(prob, float), np.arange(len(prob)) % 2 == 1
    for half in (odd, ~odd):
        if half.any() and (~half).any():
            scaled[half] = scale(prob[half], fit_temperature(prob[~half], outcome[~half]))
    return scaled


def logit(prob: np.ndarray, limit: float = 1e-12) -> np.ndarray:
    """The log-odds of probabilities, those of certainty cut off."""
    prob = np.clip(np.asarray(prob, float), limit, 1 - limit)
    return np.log(prob) - np.log1p(-prob)
