import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from rlaif_jax.sampling.distribution import SamplingConfig, draw, filter_logits

LOGITS = npst.arrays(np.float32, (3, 12), elements=st.floats(-8, 8, width=16), unique=True)


def oracle(logits, config):
    """The tokens that stay, one row and one filter at a time."""
    kept = np.ones(len(logits), bool)

    def probs():
        masked = np.where(kept, logits / config.temperature, -np.inf)
        exponentials = np.exp(masked - masked.max())
        return exponentials / exponentials.sum()

    if config.top_k:
        kept[np.argsort(-logits)[config.top_k :]] = False
    if config.top_p < 1:
        p, total = probs(), 0.0
        for token in np.argsort(-p):
            kept[token] &= total < config.top_p
            total += p[token]
    if config.min_p > 0:
        p = probs()
        kept &= p >= config.min_p * p.max()
    return kept, probs()


@settings(deadline=None, max_examples=40)
@given(
    LOGITS,
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 4, 100]),
    st.sampled_from([0.2, 0.7, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_filters_keep_what_a_loop_keeps(logits, temperature, top_k, top_p, min_p):
    config = SamplingConfig(temperature, top_k, top_p, min_p)
    filtered = np.asarray(filter_logits(logits, config))
    found = np.asarray(jax.nn.softmax(filtered, axis=-1))
    for row, probs in zip(logits.astype(np.float64), found, strict=True):
        kept, expected = oracle(row, config)
        # A cut that falls on the threshold up to rounding may go either way.
        if not np.array_equal(probs > 0, kept):
            assert abs(expected[kept != (probs > 0)].sum()) < 1e-5 or _on_the_threshold(row, config)
        else:
            np.testing.assert_allclose(probs, expected, atol=1e-5)


def _on_the_threshold(row, config):
    shifted = [SamplingConfig(config.temperature, config.top_k, config.top_p + e, config.min_p) for e in (-1e-5, 1e-5)]
    return not np.array_equal(*(oracle(row, each)[0] for each in shifted))


def test_drawn_tokens_stay_within_the_filters_and_bring_both_logprobs():
    config = SamplingConfig(temperature=0.7, top_k=3, top_p=1.0, min_p=0.0)
    logits = np.random.default_rng(0).normal(size=(1, 20)).astype(np.float32).repeat(500, axis=0)
    tokens, logprobs, raw = draw(logits, jax.random.split(jax.random.key(0), 500), config)
    top = np.argsort(-logits[0])[:3]
    assert set(np.asarray(tokens)) == set(top)
    scaled = logits[0, top] / 0.7
    for token, score in zip(top, scaled - np.log(np.exp(scaled).sum()), strict=True):
        drawn = np.asarray(tokens) == token
        np.testing.assert_allclose(np.asarray(logprobs)[drawn], score, rtol=1e-4)
        np.testing.assert_allclose(np.asarray(raw)[drawn], jax.nn.log_softmax(logits[0])[token], rtol=1e-4)
        assert abs(drawn.mean() - np.exp(score)) < 0.08


@pytest.mark.parametrize("top_k", [0, 2])
def test_temperature_zero_takes_the_likeliest(top_k):
    logits = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    tokens, logprobs, raw = draw(logits, keys, SamplingConfig(0.0, top_k, 1.0, 0.0))
    assert np.array_equal(tokens, logits.argmax(axis=1))
    assert np.array_equal(logprobs, raw)
