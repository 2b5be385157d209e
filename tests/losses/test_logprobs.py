import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.losses import logprobs
from rlaif_jax.losses.logprobs import token_logprobs

RNG = np.random.default_rng(0)
LENGTH = 11
HIDDEN = RNG.normal(size=(2, LENGTH, 8)).astype(np.float32)
UNEMBEDDING = RNG.normal(size=(8, 20)).astype(np.float32)
TARGETS = RNG.integers(0, 20, (2, LENGTH))
WEIGHTS = RNG.normal(size=(2, 2, LENGTH)).astype(np.float32)


def plain(hidden, unembedding, temperature):
    logits = hidden @ unembedding / temperature
    log_probs = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
    return jnp.take_along_axis(log_probs, TARGETS[..., None], -1)[..., 0], entropy


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(function):
    def weighted(hidden, unembedding):
        outputs = function(hidden, unembedding)
        return sum(jnp.vdot(w, x) for w, x in zip(WEIGHTS, outputs, strict=True)), outputs

    return jax.value_and_grad(weighted, (0, 1), has_aux=True)(HIDDEN, UNEMBEDDING)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 11, 128])
def test_chunked_equals_a_plain_log_softmax(chunk, temperature):
    def chunked(hidden, unembedding):
        return token_logprobs(hidden, unembedding, TARGETS, temperature, chunk)

    (_, outputs), gradients = value_and_gradient(chunked)
    (_, expected), expected_gradients = value_and_gradient(lambda *args: plain(*args, temperature))
    for ours, theirs in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_entropy_of_a_uniform_distribution_is_the_log_of_the_vocabulary():
    _, entropy = token_logprobs(HIDDEN, np.zeros_like(UNEMBEDDING), TARGETS)
    np.testing.assert_allclose(entropy, np.log(20), rtol=1e-6)


def test_bfloat16_states_give_float32_logprobs():
    scores, entropy = token_logprobs(jnp.asarray(HIDDEN, jnp.bfloat16), UNEMBEDDING, TARGETS)
    assert scores.dtype == entropy.dtype == jnp.float32


def test_logits_of_the_whole_length_never_exist(monkeypatch):
    batch, length, width, vocab = 2, 64, 8, 4096
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * batch * 8 * vocab)  # eight positions at a time
    hidden, unembedding = np.zeros((batch, length, width), np.float32), np.zeros((width, vocab), np.float32)
    targets = np.zeros((batch, length), np.int32)

    def loss(hidden, unembedding):
        return token_logprobs(hidden, unembedding, targets)[0].sum()

    for function in (loss, jax.grad(loss, (0, 1))):
        memory = jax.jit(function).lower(hidden, unembedding).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * batch * length * vocab / 1.5
    assert logprobs._chunk(batch, length, vocab) == 8
    assert logprobs._chunk(batch, length + 1, vocab) == 8  # nine chunks of 8, of which the last is mostly padding
    assert logprobs._chunk(batch, 5, vocab) == 5
