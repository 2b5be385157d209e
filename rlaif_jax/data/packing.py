"""Several examples in one row, told apart by segment ids, so that no step is spent on padding."""

from collections.abc import Sequence

import numpy as np
from flax import struct


class PackedRows(struct.PyTreeNode):
    """A batch of rows that hold whole examples one after another."""

    tokens: np.ndarray  # [rows, length] int32
    segment_ids: np.ndarray  # [rows, length] int32: 1, 2, ... for the examples of a row, 0 for padding
    completion_mask: np.ndarray  # [rows, length] bool: true on the tokens that are learned


# (tokens of the prompt, tokens of the completion)
Example = tuple[Sequence[int], Sequence[int]]
_OPEN_ROWS = 64  # rows that may still take an example: more of them fill better and take longer to search


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """First fit: which examples share a row, in the order given. No length may be above `row_length`."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        first = max(0, len(rows) - _OPEN_ROWS)
        row = next((i for i in range(first, len(rows)) if room[i] >= length), None)
        if row is None:
            rows.append([index])
            room.append(row_length - length)
        else:
            rows[row].append(index)
            room[row] -= length
    return rows


def lay_out(rows: Sequence[Sequence[Example]], row_length: int) -> PackedRows:
    """The arrays of some rows of examples."""
    shape = (len(rows), row_length)
    packed = PackedRows(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))
    for row, examples in enumerate(rows):
        start = 0
        for segment, (prompt, completion) in enumerate(examples, 1):
            learned, end = start + len(prompt), start + len(prompt) + len(completion)
            packed.tokens[row, start:end] = [*prompt, *completion]
            packed.segment_ids[row, start:end] = segment
            packed.completion_mask[row, learned:end] = True
            start = end
    return packed
