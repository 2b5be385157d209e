"""Log-probabilities of tokens, entropy and KL of their distributions, without logits of the whole length at once."""

import functools
import math

import jax
import jax.numpy as jnp

LOGITS_BYTES = 1 << 28  # of float32 logits that may exist at a time on each device


def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    temperature: float = 1.0,
    chunk: int | None = None,
    cap: float = 0.0,
) -> jax.Array:
    """Log-probability of each target under softmax(logits / temperature), the logits being hidden @ unembedding.

    Args:
      hidden: [batch, length, width]; hidden[:, t] predicts targets[:, t].
      unembedding: [width, vocab].
      targets: [batch, length] int32.
      temperature: the sampling temperature, so that the log-probs are those of the distribution sampled from.
      chunk: positions whose logits exist at a time, by default what `LOGITS_BYTES` allows. The backward pass, which is
        exact, computes them again, so that logits of a longer length never exist; those of a single chunk are kept.
      cap: where not 0, logits x are cap * tanh(x / cap) (Gemma 2, arXiv 2408.00118, section 2).

    Returns [batch, length] float32.
    """
    length = targets.shape[1]
    chunk = min(chunk or _chunk(*targets.shape, unembedding.shape[1]), length)
    hidden, targets = (_padded(x, chunk) for x in (hidden, targets))
    return _token_logprobs(hidden, unembedding, targets, temperature, chunk, cap)[:, :length]


def entropy_and_kl(
    hidden: jax.Array,
    unembedding: jax.Array,
    ref_hidden: jax.Array,
    ref_unembedding: jax.Array,
    temperature: float = 1.0,
    chunk: int | None = None,
    cap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Entropy of p = softmax(logits / temperature), and KL(p || q), q being the reference's, both exact.

    The shapes, `chunk` and `cap` are those of `token_logprobs`. Returns two [batch, length] float32, in nats.
    """
    length = hidden.shape[1]
    chunk = min(chunk or _chunk(*hidden.shape[:2], 2 * unembedding.shape[1]), length)  # of two distributions

    @jax.checkpoint
    def one(chunks):
        hidden, ref_hidden = chunks
        logprobs = jax.nn.log_softmax(_logits(hidden, unembedding, temperature, cap))
        ref_logits = _logits(ref_hidden, ref_unembedding, temperature, cap)
        probs, ref_logprobs = jnp.exp(logprobs), jax.nn.log_softmax(ref_logits)
        return -jnp.sum(probs * logprobs, axis=-1), jnp.sum(probs * (logprobs - ref_logprobs), axis=-1)

    entropy, kl = _over_chunks(one, (_padded(hidden, chunk), _padded(ref_hidden, chunk)), chunk)
    return entropy[:, :length], kl[:, :length]


def _padded(x: jax.Array, chunk: int) -> jax.Array:
    """[batch, length, ...] with the length filled up to a multiple of `chunk`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))


def _chunk(batch: int, length: int, vocab: int) -> int:
    """Positions of the fewest equal chunks whose logits fit."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = batch if mesh.empty else max(batch // (mesh.shape["data"] * mesh.shape["fsdp"]), 1)
    fitting = max(LOGITS_BYTES // (4 * rows * vocab), 1)
    return math.ceil(length / math.ceil(length / fitting))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_logprobs(hidden, unembedding, targets, temperature: float, chunk: int, cap: float):
    return _forward(hidden, unembedding, targets, temperature, chunk, cap)[0]


def _forward(hidden, unembedding, targets, temperature: float, chunk: int, cap: float):
    matrix = unembedding.astype(hidden.dtype)
    # A single chunk is needed again at once, as a rule: keeping it costs no memory at the peak.
    kept = _logits(hidden, matrix, temperature, cap) if chunk == hidden.shape[1] else None

    def one(chunks):
        hidden, targets, logits = chunks
        if logits is None:
            logits = _logits(hidden, matrix, temperature, cap)
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_sum, log_sum

    logprobs, log_sum = _over_chunks(one, (hidden, targets, kept), chunk)
    return logprobs, (hidden, unembedding, targets, log_sum, kept)


def _backward(temperature: float, chunk: int, cap: float, residuals, cotangents):
    """With p the softmax of the logits z: d logprob / dz = onehot - p, and d cap tanh(x / cap) / dx = 1 - tanh^2."""
    hidden, unembedding, *rest = residuals
    matrix = unembedding.astype(hidden.dtype)

    def one(gradient, chunks):
        hidden, targets, log_sum, logits, for_logprob = chunks
        if logits is None:
            logits = _logits(hidden, matrix, temperature, cap)
        at_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        slope = for_logprob[..., None] / temperature
        for_logits = slope * (at_target - jnp.exp(logits - log_sum[..., None]))
        if cap:
            for_logits *= 1 - (logits * temperature / cap) ** 2
        for_hidden, for_matrix = _gradients(hidden, matrix, for_logits)
        return gradient + for_matrix, for_hidden

    zeros = jnp.zeros(unembedding.shape, jnp.float32)
    chunks = jax.tree.map(functools.partial(_split, chunk=chunk), (hidden, *rest, cotangents))
    for_unembedding, for_hidden = jax.lax.scan(one, zeros, chunks)
    return _join(for_hidden), for_unembedding.astype(unembedding.dtype), None


_token_logprobs.defvjp(_forward, _backward)


def _logits(hidden, unembedding, temperature: float, cap: float):
    logits = _product(hidden, unembedding)
    return (cap * jnp.tanh(logits / cap) if cap else logits) / temperature


@jax.custom_vjp
def _product(hidden, unembedding):
    """Of factors in the dtype of hidden; float32."""
    return jnp.matmul(hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _product_forward(hidden, unembedding):
    return _product(hidden, unembedding), (hidden, unembedding)


def _product_backward(residuals, for_logits):
    hidden, unembedding = residuals
    for_hidden, for_unembedding = _gradients(hidden, unembedding.astype(hidden.dtype), for_logits)
    return for_hidden, for_unembedding.astype(unembedding.dtype)


_product.defvjp(_product_forward, _product_backward)


def _gradients(hidden, matrix, for_logits) -> tuple[jax.Array, jax.Array]:
    """Of hidden, in its dtype, and of the matrix: a sum in float32, over tokens and over devices."""
    for_logits = for_logits.astype(hidden.dtype)
    product = functools.partial(jnp.einsum, "blw,blv->wv", preferred_element_type=jnp.float32)
    # XLA's CPU backend lacks some products of bfloat16 factors with float32 sums: there the factors are widened.
    wide = lambda *factors: product(*(x.astype(jnp.float32) for x in factors))  # noqa: E731
    for_matrix = jax.lax.platform_dependent(hidden, for_logits, cpu=wide, default=product)
    return jnp.einsum("blv,wv->blw", for_logits, matrix), for_matrix


def _over_chunks(function, arrays, chunk: int):
    outputs = jax.lax.map(function, jax.tree.map(functools.partial(_split, chunk=chunk), arrays))
    return jax.tree.map(_join, outputs)


def _split(x, chunk: int):
    """[batch, length, ...] -> [chunks, batch, chunk, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(x):
    """[chunks, batch, chunk, ...] -> [batch, length, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
