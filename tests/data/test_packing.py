import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.data.packing import lay_out, pack


@settings(deadline=None)
@given(st.lists(st.integers(1, 10), max_size=200), st.integers(10, 30))
def test_every_example_is_in_one_row_that_it_fits(lengths, row_length):
    rows = pack(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_length for row in rows)


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(20, 60, 2000)
    rows = pack(lengths, 132)
    assert lengths.sum() / (len(rows) * 132) > 0.95


def test_a_row_holds_whole_examples_with_their_own_segment():
    packed = lay_out([[([5, 6], [7, 1]), ([8], [9, 1])], []], 9)
    assert packed.tokens.tolist() == [[5, 6, 7, 1, 8, 9, 1, 0, 0], [0] * 9]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0], [0] * 9]
    assert packed.completion_mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 1, 1, 0, 0], [0] * 9]
