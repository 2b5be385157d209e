"""Log-probabilities and entropy of given tokens, without logits of the whole length at once."""

import math

import jax
import jax.numpy as jnp

LOGITS_BYTES = 1 << 27  # of float32 logits that may exist at a time on each device


def token_logprobs(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, temperature: float = 1.0, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target under softmax(hidden @ unembedding / temperature), and the entropy.

    Args:
      hidden: [batch, length, width]; hidden[:, t] predicts targets[:, t].
      unembedding: [width, vocab].
      targets: [batch, length] int32.
      temperature: the sampling temperature, so that the log-probs are those of the distribution sampled from.
      chunk: positions whose logits exist at a time, by default what `LOGITS_BYTES` allows; the backward pass
        recomputes them, so that logits of the whole length never exist.

    Returns (logprobs, entropy), each [batch, length] float32; entropy in nats.
    """

    @jax.checkpoint
    def one_chunk(hidden, targets):
        logits = (hidden @ unembedding.astype(hidden.dtype)).astype(jnp.float32) / temperature
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    length = targets.shape[1]
    chunk = chunk or _chunk(*targets.shape, unembedding.shape[1])
    if length <= chunk:
        return one_chunk(hidden, targets)
    padding = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))

    def chunked(x):  # [batch, length, ...] -> [chunks, batch, chunk, ...]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    outputs = jax.lax.map(lambda xs: one_chunk(*xs), (chunked(hidden), chunked(targets)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(targets.shape)[:, :length] for x in outputs)


def _chunk(batch: int, length: int, vocab: int) -> int:
    """Positions of the fewest equal chunks whose logits fit."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = batch if mesh.empty else max(batch // (mesh.shape["data"] * mesh.shape["fsdp"]), 1)
    fitting = max(LOGITS_BYTES // (4 * rows * vocab), 1)
    return math.ceil(length / math.ceil(length / fitting))
