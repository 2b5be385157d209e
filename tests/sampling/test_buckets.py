import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.sampling.buckets import bucket_of, length_buckets


def padded(lengths, buckets):
    return sum(bucket_of(length, buckets) for length in lengths)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([1, 4]))
def test_no_other_choice_of_as_many_lengths_pads_less(lengths, count, multiple):
    buckets = length_buckets(lengths, count, multiple)
    assert len(buckets) <= count
    assert all(bucket % multiple == 0 for bucket in buckets)
    sizes = sorted({-(-length // multiple) * multiple for length in lengths})
    choices = itertools.chain.from_iterable(
        itertools.combinations(sizes[:-1], n) for n in range(min(count, len(sizes)))
    )
    assert padded(lengths, buckets) == min(padded(lengths, [*choice, sizes[-1]]) for choice in choices)


def test_a_length_beyond_the_longest_bucket_takes_the_least_doubling_of_it():
    assert [bucket_of(length, [8, 12]) for length in (1, 8, 9, 12, 13, 24, 25, 49)] == [8, 8, 12, 12, 24, 24, 48, 96]


def test_a_thousand_mixed_lengths_are_padded_less_than_to_powers_of_two():
    lengths = np.random.default_rng(0).lognormal(5, 1, 1000).astype(int) + 1
    powers = [2**i for i in range(4, 14)]
    assert padded(lengths, length_buckets(lengths, 7, 16)) < 0.95 * padded(lengths, powers)
