import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.losses import logprobs
from rlaif_jax.losses.logprobs import entropy_and_kl, token_logprobs

RNG = np.random.default_rng(0)
LENGTH = 11
HIDDEN = RNG.normal(size=(2, LENGTH, 8)).astype(np.float32)
UNEMBEDDING = RNG.normal(size=(8, 20)).astype(np.float32)
TARGETS = RNG.integers(0, 20, (2, LENGTH))
WEIGHTS = RNG.normal(size=(2, 2, LENGTH)).astype(np.float32)
REF_HIDDEN, REF_UNEMBEDDING = (x + RNG.normal(size=x.shape).astype(np.float32) for x in (HIDDEN, UNEMBEDDING))


def plain(hidden, unembedding, temperature):
    logits = hidden @ unembedding / temperature
    log_probs = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    ref_log_probs = jax.nn.log_softmax(REF_HIDDEN @ REF_UNEMBEDDING / temperature)
    probs = jnp.exp(log_probs)
    entropy, kl = -(probs * log_probs).sum(-1), (probs * (log_probs - ref_log_probs)).sum(-1)
    return jnp.take_along_axis(log_probs, TARGETS[..., None], -1)[..., 0], entropy, kl


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(function):
    def weighted(hidden, unembedding):
        outputs = function(hidden, unembedding)
        return sum(jnp.vdot(w, x) for w, x in zip(WEIGHTS, outputs, strict=False)), outputs

    return jax.value_and_grad(weighted, (0, 1), has_aux=True)(HIDDEN, UNEMBEDDING)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 11, 128])
def test_chunked_equals_a_plain_log_softmax(chunk, temperature):
    def chunked(hidden, unembedding):
        return (token_logprobs(hidden, unembedding, TARGETS, temperature, chunk),)

    def exact(hidden, unembedding):
        return entropy_and_kl(hidden, unembedding, REF_HIDDEN, REF_UNEMBEDDING, temperature, chunk)

    for function, chosen in ((chunked, slice(0, 1)), (exact, slice(1, 3))):
        (_, outputs), gradients = value_and_gradient(function)
        (_, expected), expected_gradients = value_and_gradient(
            lambda *args, chosen=chosen: plain(*args, temperature)[chosen]
        )
        for ours, theirs in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_entropy_of_a_uniform_distribution_is_the_log_of_the_vocabulary():
    flat = np.zeros_like(UNEMBEDDING)
    entropy, _ = entropy_and_kl(HIDDEN, flat, HIDDEN, flat)
    np.testing.assert_allclose(entropy, np.log(20), rtol=1e-6)


def test_the_kl_of_a_distribution_from_itself_is_zero_and_has_no_gradient():
    def kl(hidden, unembedding):
        return (entropy_and_kl(hidden, unembedding, HIDDEN, UNEMBEDDING)[1],)

    (_, (values,)), gradients = value_and_gradient(kl)
    assert not np.asarray(values).any()
    assert all(np.abs(gradient).max() < 1e-5 for gradient in gradients)


def test_bfloat16_states_give_float32_logprobs():
    half = jnp.asarray(HIDDEN, jnp.bfloat16)
    entropy, kl = entropy_and_kl(half, UNEMBEDDING, half, UNEMBEDDING)
    assert token_logprobs(half, UNEMBEDDING, TARGETS).dtype == entropy.dtype == kl.dtype == jnp.float32


def test_logits_of_the_whole_length_never_exist(monkeypatch):
    batch, length, width, vocab = 2, 128, 8, 4096
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * batch * 8 * vocab)  # eight positions at a time
    hidden, unembedding = np.zeros((batch, length, width), np.float32), np.zeros((width, vocab), np.float32)
    targets = np.zeros((batch, length), np.int32)

    def loss(hidden, unembedding):
        return token_logprobs(hidden, unembedding, targets).sum()

    def exact(hidden, unembedding):
        return entropy_and_kl(hidden, unembedding, 2 * hidden, 2 * unembedding)[1].sum()

    for function in (loss, jax.grad(loss, (0, 1)), exact, jax.grad(exact, (0, 1))):
        memory = jax.jit(function).lower(hidden, unembedding).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * batch * length * vocab / 1.5
    assert logprobs._chunk(batch, length, vocab) == 8
    assert logprobs._chunk(batch, length + 1, vocab) == 8  # nine chunks of 8, of which the last is mostly padding
    assert logprobs._chunk(batch, 5, vocab) == 5
