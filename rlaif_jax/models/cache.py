"""Keys and values that were computed before: of a prompt, a shared prefix, or the tokens decoded so far."""

import jax
import jax.numpy as jnp
from flax import struct

from rlaif_jax.parallel.mesh import constrain

INT8_LARGEST = 127


class LayerCache(struct.PyTreeNode):
    """Keys and values of one layer, or of all layers stacked along a leading axis."""

    key: jax.Array  # [batch, slots, kv_heads, head_dim]
    value: jax.Array  # [batch, slots, kv_heads, head_dim]
    key_scale: jax.Array | None = None  # [batch, slots, kv_heads] float32: int8 keys times this are the keys
    value_scale: jax.Array | None = None


class KVCache(struct.PyTreeNode):
    """Keys and values of all layers."""

    layers: LayerCache | tuple[LayerCache, ...]  # stacked where the layers are scanned, else one a layer
    mask: jax.Array | None  # [batch, slots] bool: the slot holds a real token; None where all do
    length: jax.Array  # [] int32: tokens taken; the next goes to this slot, modulo the slots
    positions: jax.Array | None = None  # [batch, slots] int32, where a window slides

    @property
    def slots(self) -> int:
        """Room for so many tokens a row."""
        layer = self.layers[0] if isinstance(self.layers, tuple) else self.layers
        return layer.key.shape[-3]


def empty_cache(like: KVCache, batch: int, slots: int) -> KVCache:
    """A cache of other size with the layers, heads and dtypes of `like`, nothing in it."""

    def empty(x):
        return jnp.zeros((batch, slots, *x.shape[2:]), x.dtype)

    layers = tuple(split_rows(jax.tree.map(empty, layer)) for layer in like.layers)
    positions = None if like.positions is None else jnp.zeros((batch, slots), jnp.int32)
    return KVCache(layers, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32), positions)


def split_rows(layer: LayerCache) -> LayerCache:
    """The same, split over devices by rows and heads: left to the compiler, each device may hold all of it."""
    axes, odd = ("batch", None, "kv_heads", None), ("batch", "kv_heads")
    return jax.tree.map(lambda x: constrain(x, *axes[: x.ndim], odd=odd), layer)


def append(cache: LayerCache, new: LayerCache, slot: jax.Array) -> LayerCache:
    """`cache` with the keys and values of one token a row in slot `slot`, in place."""

    def write(old, x):
        return jax.lax.dynamic_update_slice(old, x, (0, slot) + (0,) * (x.ndim - 2))

    return jax.tree.map(write, cache, compress(new, cache.key.dtype))


def compress(layer: LayerCache, dtype: str) -> LayerCache:
    """Keys and values in another dtype; int8 has one scale for each token and head."""
    if jnp.dtype(dtype) != jnp.int8:
        return LayerCache(layer.key.astype(dtype), layer.value.astype(dtype))
    (key, key_scale), (value, value_scale) = _int8(layer.key), _int8(layer.value)
    return LayerCache(key, value, key_scale, value_scale)


def _int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounded to the nearest of 255 steps between minus and plus the largest entry along the last axis."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), jnp.finfo(jnp.float32).tiny) / INT8_LARGEST
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale
