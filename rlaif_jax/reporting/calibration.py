"""How far the judge's probabilities can be taken at their word, on pairs of which exactly one reply is good."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlaif_jax.evaluation.statistics import Figure, wilson_ci
from rlaif_jax.reporting.read import GroundTruth

MAX_BINS = 8
MIN_PAIRS = 8  # in a bin, so that its interval says something


@dataclasses.dataclass(frozen=True)
class Bin:
    """Pairs with similar probabilities."""

    probability: float  # their mean
    good: Figure  # how often reply A is the good one


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The judge's probabilities beside the ground truth."""

    bins: list[Bin]
    confidence: float  # the mean probability that the judge gives to the reply that it prefers
    accuracy: Figure  # how often it prefers the good reply; a tie is no preference

    @property
    def n(self) -> int:
        """Pairs of which exactly one reply is good."""
        return sum(bin_.good["n"] for bin_ in self.bins)


def probabilities(rows: list[dict]) -> list[float]:
    """The label of each scored pair."""
    return [row["prob_a"] for row in rows if row["status"] == "ok"]


def calibrate(rows: list[dict], ground_truth: GroundTruth) -> Calibration | None:
    """The reliability of the labels in `rows`; None where no scored pair has exactly one good reply."""
    pairs = []
    for row in rows:
        good_a, good_b = (ground_truth(row["prompt"], row[f"response_{x}"]) for x in "ab")
        if row["status"] == "ok" and None not in (good_a, good_b) and good_a != good_b:
            pairs.append((row["prob_a"], good_a))
    return calibration(*zip(*pairs, strict=True)) if pairs else None


def calibration(prob_a: Sequence[float], a_is_good: Sequence[bool]) -> Calibration:
    """The reliability of probabilities beside what is so. Needs a pair."""
    order = np.lexsort((a_is_good, prob_a))
    prob_a, a_is_good = np.asarray(prob_a, float)[order], np.asarray(a_is_good, float)[order]
    # As many pairs in each bin: the probabilities crowd around 0.5, and bins of equal width would leave most empty.
    groups = np.array_split(np.arange(len(prob_a)), np.clip(len(prob_a) // MIN_PAIRS, 1, MAX_BINS))
    bins = [Bin(float(prob_a[rows].mean()), wilson_ci(int(a_is_good[rows].sum()), len(rows))) for rows in groups]
    right = int(np.sum((prob_a > 0.5) == a_is_good.astype(bool)))
    return Calibration(bins, float(np.maximum(prob_a, 1 - prob_a).mean()), wilson_ci(right, len(prob_a)))
