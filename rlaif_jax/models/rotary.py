"""Rotary position embedding (Su et al., arXiv 2104.09864) and the ways in which it is stretched to longer contexts."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies differ from those of a model's rope_theta, by the names of Hugging Face's `rope_parameters`."""

    rope_type: str = "default"  # a name in SCALINGS
    factor: float = 1.0  # by which positions are stretched
    low_freq_factor: float = 1.0  # of "llama3": wavelengths of over original / low_freq_factor tokens are stretched
    high_freq_factor: float = 4.0  # and those of under original / high_freq_factor are not
    original_max_position_embeddings: int = 0


NO_SCALING = RopeScaling()


def rope_frequencies(dimensions: int, theta: float, scaling: RopeScaling) -> jax.Array:
    """Radians a position of each rotated pair: [dimensions / 2] float32."""
    half = dimensions // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return SCALINGS[scaling.rope_type](frequencies, scaling)


def _llama3(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Long wavelengths stretched, short ones kept, those between a mixture (Llama 3.1)."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


SCALINGS = {
    "default": lambda frequencies, scaling: frequencies,
    "linear": lambda frequencies, scaling: frequencies / scaling.factor,
    "llama3": _llama3,
}


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotates pairs of dimensions, one of each half (Hugging Face's layout), of as many as there are frequencies for.

    x: [batch, length, heads, head_dim]; positions: [batch, length] int32; frequencies: [rotated / 2] float32.
    """
    rotated, kept = x[..., : 2 * len(frequencies)], x[..., 2 * len(frequencies) :]
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [batch, length, 1, rotated / 2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, kept], axis=-1) if kept.shape[-1] else rotated
