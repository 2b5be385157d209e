"""Where people's time goes furthest: how many labels a figure needs, and which pairs to ask about next."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

HALF_WIDTHS = (0.1, 0.05, 0.03, 0.02, 0.01)


def labels_needed(agreement: float, half_width: float, confidence: float = 0.95) -> int:
    """How many human labels put a share of about `agreement` within +- half_width (Wilson's interval, 1927).

    The half of Wilson's interval is z / (n + z^2) * sqrt(n p (1 - p) + z^2 / 4), which falls with n.
    """
    z, p = stats.norm.ppf(0.5 + confidence / 2), agreement

    def half(n: float) -> float:
        return z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)

    high = 1
    while half(high) > half_width:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if half(middle) > half_width else (low, middle)
    return high


def label_next(columns: Mapping[str, Sequence[Any]], count: int) -> list[int]:
    """The rows of a label file that people should look at first, at most `count`: where the judge contradicts itself.

    A pair counts for as far as its orders, or its questions, differ, and then for how unsure their mean is; pairs that
    could not be scored come first. Rows that people have labelled (`human`) are left out.
    """
    human = columns.get("human") or [None] * len(columns["status"])
    doubt = [
        (math.inf if status != "ok" else _disagreement(columns, row) + 1e-6 * (0.5 - abs(columns["prob_a"][row] - 0.5)))
        for row, status in enumerate(columns["status"])
    ]
    rows = [row for row, label in enumerate(human) if label is None and columns["status"][row] != "identical"]
    return sorted(rows, key=lambda row: -doubt[row])[:count]


def _disagreement(columns: Mapping[str, Sequence[Any]], row: int) -> float:
    """The standard deviation of what is said of one pair, over orders, questions, members of a panel and principles."""
    orders = [columns[name][row] for name in ("prob_a_forward", "prob_a_reversed")]
    axes = (columns.get("prob_a_axes") or {row: None})[row] or ()
    members, principles = ((columns.get(f"prob_a_{of}") or {row: None})[row] or {} for of in ("members", "principles"))
    said = [value for value in (*orders, *axes, *members.values(), *principles.values()) if value is not None]
    return float(np.std(said)) if said else 0.0
