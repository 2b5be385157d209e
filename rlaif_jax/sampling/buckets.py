"""Lengths that rows are padded to: few, so that few programs are compiled, and close to those that occur."""

import math
from collections.abc import Sequence

import numpy as np


def length_buckets(lengths: Sequence[int], count: int, multiple: int) -> list[int]:
    """At most `count` lengths, rising, such that the padding of each row to the next one is least in total.

    All are multiples of `multiple`; the last one holds the longest row.
    """
    needed = -(-np.asarray(lengths, np.int64) // multiple) * multiple
    sizes, rows = np.unique(needed, return_counts=True)
    before = np.concatenate([[0], np.cumsum(rows)])  # rows of a size below the i-th

    # cost[i]: the least tokens for the sizes below the i-th with as many buckets as there were rounds; last[i]: the
    # size at which the last of those buckets begins.
    cost, choices = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf), []
    for _ in range(min(count, len(sizes))):
        filled = np.full(len(sizes) + 1, np.inf)
        filled[0], last = 0, np.zeros(len(sizes) + 1, int)
        for end in range(1, len(sizes) + 1):
            totals = cost[:end] + (before[end] - before[:end]) * sizes[end - 1]
            last[end] = int(np.argmin(totals))
            filled[end] = totals[last[end]]
        cost = filled
        choices.append(last)
    buckets, end = [], len(sizes)
    for last in reversed(choices):
        if end:
            buckets.append(int(sizes[end - 1]))
            end = last[end]
    return sorted(buckets)


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The least bucket that holds `length`; beyond the longest one, the least that doubling it gives."""
    fitting = [bucket for bucket in buckets if length <= bucket]
    return min(fitting) if fitting else buckets[-1] << (math.ceil(length / buckets[-1]) - 1).bit_length()
