"""The Llama-family decoder and its two uses: a language model and a scalar model (reward, value).

One architecture serves policy, reference, value network, reward model and local judge, under different
parameter trees. Modules are used only through `init` and `apply`; parameters are plain nested dicts, with the
layers stacked along a leading axis and scanned.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from rlaif_jax.parallel.mesh import constrain

MASKED = -1e30  # finite, so that a query row with nothing to attend to gives no NaN


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, by the names of Hugging Face's `LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    remat: bool = False  # recompute each layer in the backward pass
    dtype: str = "float32"  # of the computation; parameters, softmax and norms stay float32


class KVCache(struct.PyTreeNode):
    """Keys and values of all layers in one array each, so that decoding updates them in place."""

    key: jax.Array  # [layers, batch, slots, kv_heads, head_dim]
    value: jax.Array  # [layers, batch, slots, kv_heads, head_dim]
    mask: jax.Array  # [batch, slots] bool: the slot holds a real token
    length: jax.Array  # [] int32: the next slot to write


def empty_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """A cache with room for `slots` tokens a row, in the dtype of the computation."""
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.dtype)
    return KVCache(zeros, zeros, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))


def _weight(module: nn.Module, name: str, shape, axes, fan_in: int) -> jax.Array:
    """Declares one weight: shape, logical axes, and a normal initialiser of variance 1 / fan_in."""
    init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)
    return module.param(name, init, shape, jnp.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32 (Zhang & Sennrich, arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> the same shape and dtype."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


def project(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """Contracts the last `contracted` dimensions of x with the first ones of weight, in the dtype of x.

    [batch, length, *in] x [*in, *out] -> [batch, length, *out], as one product of two matrices: XLA's CPU backend
    takes twice as long for the gradient of the same contraction with separate batch and length dimensions.
    """
    inputs, outputs = weight.shape[:contracted], weight.shape[contracted:]
    matrix = weight.astype(x.dtype).reshape(math.prod(inputs), math.prod(outputs))
    return (x.reshape(-1, math.prod(inputs)) @ matrix).reshape(*x.shape[:-contracted], *outputs)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding on halves (Su et al., arXiv 2104.09864, in Hugging Face's layout).

    x: [batch, length, heads, head_dim]; positions: [batch, length] int32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [batch, length, 1, half]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(query: jax.Array, blocks: list[tuple[jax.Array, jax.Array, jax.Array | None]]) -> jax.Array:
    """Grouped-query attention over one or more blocks of keys, softmax in float32 over all of them.

    query: [batch, length, heads, head_dim]. Each block is (key, value, mask) with key and value
    [batch or 1, slots, kv_heads, head_dim] and mask [batch or 1, length, slots], or None where all slots count; a
    block of batch 1 is shared by all rows without being copied. Returns [batch, length, heads, head_dim].
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = blocks[0][0].shape[-2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    outputs, sums = zip(*(_attend_block(grouped, *block) for block in blocks), strict=True)
    # A softmax over all keys is the softmaxes of the blocks, each weighted by its share of the sum.
    shares = jax.nn.softmax(jnp.stack(sums), axis=0)[..., None].astype(query.dtype)
    out = sum(share * output for share, output in zip(shares, outputs, strict=True)) if len(blocks) > 1 else outputs[0]
    return out.reshape(batch, length, heads, head_dim)


def _attend_block(query, key, value, mask):
    """One block's attention [batch, length, kv_heads, group, head_dim] and log-sum-exp of scores, without head_dim."""
    # Each order of dimensions is the one in which the product comes out, so that no scores are transposed.
    scored, keys = ("kblgs", "skh") if key.shape[0] == 1 else ("bklgs", "bskh")
    if keys == "skh":
        key, value = key[0], value[0]
    scores = jnp.einsum(f"blkgh,{keys}->{scored}", query, key).astype(jnp.float32)
    if mask is not None:
        rows = mask[:, None, :, None] if scored == "bklgs" else mask[None, :, :, None]
        scores = jnp.where(rows, scores, MASKED)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(f"{scored},{keys}->{scored[:-1]}h", weights.astype(query.dtype), value)
    out = out / total.astype(query.dtype)
    log_sum = (largest + jnp.log(total))[..., 0]
    if scored == "kblgs":
        return jnp.moveaxis(out, 0, 2), jnp.moveaxis(log_sum, 0, 2)
    return jnp.moveaxis(out, 1, 2), jnp.moveaxis(log_sum, 1, 2)


class Block(nn.Module):
    """One pre-norm decoder layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, carry, layer, prefix_key, prefix_value, positions, mask, slot):
        """The carry is (x, cached keys, cached values), the caches those of all layers. Returns (carry, None)."""
        x, cached_key, cached_value = carry
        c = self.config
        width, heads, kv_heads, head_dim = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim

        writers = 2 * c.num_hidden_layers  # the residual stream keeps its size whatever the depth (GPT-2)
        w_query = _weight(self, "query", (width, heads, head_dim), ("embed", "heads", "head_dim"), width)
        w_key = _weight(self, "key", (width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), width)
        w_value = _weight(self, "value", (width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), width)
        w_output = _weight(
            self, "output", (heads, head_dim, width), ("heads", "head_dim", "embed"), writers * heads * head_dim
        )
        w_gate = _weight(self, "gate", (width, c.intermediate_size), ("embed", "mlp"), width)
        w_up = _weight(self, "up", (width, c.intermediate_size), ("embed", "mlp"), width)
        w_down = _weight(self, "down", (c.intermediate_size, width), ("mlp", "embed"), writers * c.intermediate_size)

        h = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        query = rotate(project(h, w_query), positions, c.rope_theta)
        key = rotate(project(h, w_key), positions, c.rope_theta)
        value = project(h, w_value)
        if cached_key is not None:
            start = (layer, 0, slot, 0, 0)
            cached_key = jax.lax.dynamic_update_slice(cached_key, key[None], start)
            cached_value = jax.lax.dynamic_update_slice(cached_value, value[None], start)
            key = jax.lax.dynamic_index_in_dim(cached_key, layer, 0, keepdims=False)
            value = jax.lax.dynamic_index_in_dim(cached_value, layer, 0, keepdims=False)
        blocks = [(key, value, mask)]
        if prefix_key is not None:
            blocks.append((prefix_key, prefix_value, None))
        x = x + project(attend(query, blocks), w_output, contracted=2)

        h = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        x = x + project(jax.nn.silu(project(h, w_gate)) * project(h, w_up), w_down)
        return (constrain(x, "batch", None, None), cached_key, cached_value), None


class Decoder(nn.Module):
    """Tokens to final hidden states.

    Arguments of a call:
      tokens: [batch, length] int32.
      segment_ids: [batch, length] int32; 0 marks padding, which nothing attends to, and tokens attend only
        within their own segment. Padding may stand on either side.
      positions: [batch, length] int32 for the rotary embedding; counted within each segment where left out.
      cache: where given, the tokens are appended at slot `cache.length` and attend to every earlier slot.
      prefix: a full KVCache of batch 1 that every row attends to (a judge's preamble); read, never written.

    Returns (hidden [batch, length, hidden_size] in the dtype of the computation, the updated cache or None).
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens, segment_ids, positions=None, cache: KVCache | None = None, prefix: KVCache | None = None
    ):
        """See the class."""
        c = self.config
        length = tokens.shape[1]
        if positions is None:
            positions = segment_positions(segment_ids)
        if prefix is not None:
            positions = positions + prefix.key.shape[2]
        if cache is None:
            mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] > 0)
            mask = mask & jnp.tril(jnp.ones((length, length), bool))
            slot = None
        else:
            slot = cache.length
            filled = jax.lax.dynamic_update_slice(cache.mask, segment_ids > 0, (0, slot))
            causal = jnp.arange(filled.shape[1]) <= slot + jnp.arange(length)[:, None]
            mask = filled[:, None, :] & causal

        init = nn.with_logical_partitioning(nn.initializers.normal(c.hidden_size**-0.5), ("vocab", "embed"))
        embedding = self.param("embedding", init, (c.vocab_size, c.hidden_size), jnp.float32)
        x = constrain(embedding.astype(c.dtype)[tokens], "batch", None, None)

        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, name="layers")
        cached = (None, None) if cache is None else (cache.key, cache.value)
        prefixed = (None, None) if prefix is None else (prefix.key, prefix.value)
        (x, *cached), _ = layers((x, *cached), jnp.arange(c.num_hidden_layers), *prefixed, positions, mask, slot)
        if cache is not None:
            cache = KVCache(*cached, filled, slot + length)
        return RMSNorm(c.rms_norm_eps, name="final_norm")(x), cache


class LanguageModel(nn.Module):
    """The decoder and, where embeddings are not tied, an output matrix.

    A call returns hidden states, not logits: callers take the logits they need through `unembedding`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens, segment_ids, positions=None, cache=None, prefix=None):
        """As `Decoder`."""
        if not self.config.tie_word_embeddings:
            shape = (self.config.hidden_size, self.config.vocab_size)
            _weight(self, "lm_head", shape, ("embed", "vocab"), self.config.hidden_size)
        return Decoder(self.config, name="decoder")(tokens, segment_ids, positions, cache, prefix)


class ScalarModel(nn.Module):
    """The decoder and a linear head with one output: a reward model or a value network.

    A call returns [batch, length] float32. The head starts as N(0, 1 / (hidden_size + 1)) with bias 0
    (Stiennon et al., arXiv 2009.01325; Huang et al., arXiv 2403.17031).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens, segment_ids, positions=None):
        """tokens, segment_ids and positions as for `Decoder`."""
        width = self.config.hidden_size
        kernel = _weight(self, "kernel", (width, 1), ("embed", "scalar"), width + 1)
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("scalar",)), (1,), jnp.float32)
        hidden, _ = Decoder(self.config, name="decoder")(tokens, segment_ids, positions)
        return (hidden.astype(jnp.float32) @ kernel + bias)[..., 0]


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions that restart at 0 with each segment. [batch, length] int32 -> [batch, length] int32."""
    index = jnp.arange(segment_ids.shape[1])
    starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def unembedding(parameters) -> jax.Array:
    """The output matrix [hidden_size, vocab_size] of a LanguageModel's parameters."""
    return parameters["lm_head"] if "lm_head" in parameters else parameters["decoder"]["embedding"].T
