"""The Llama-family decoder and its two uses: a language model and a scalar model (reward, value).

One architecture serves policy, reference, value network, reward model and local judge, under different
parameter trees. Modules are used only through `init` and `apply`; parameters are plain nested dicts, with the
layers stacked along a leading axis and scanned.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from rlaif_jax.models.attention import OUTPUT_NAME, attend
from rlaif_jax.models.attention import Block as Keys
from rlaif_jax.models.cache import KVCache, LayerCache, append
from rlaif_jax.parallel.mesh import constrain, platform, splits_length


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
    remat: str = "products"  # a name in REMAT: what is kept for the backward pass, and what computed again
    attention: str = "auto"  # a name in attention.IMPLEMENTATIONS
    dtype: str = "float32"  # of the computation; parameters, softmax and norms stay float32


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
    takes twice as long for the gradient of the same contraction with separate batch and length dimensions. Where both
    are split, one dimension of them could not be. The gradient of weight is summed in weight's dtype.
    """
    if splits_length():
        return _product(x, weight, contracted)
    inputs, outputs = weight.shape[:contracted], weight.shape[contracted:]
    matrix = weight.reshape(math.prod(inputs), math.prod(outputs))
    return _product(x.reshape(-1, math.prod(inputs)), matrix, 1).reshape(*x.shape[:-contracted], *outputs)


def _product(x: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    if x.dtype == weight.dtype:
        return jnp.tensordot(x, weight, contracted)
    product = jnp.tensordot(x, jax.lax.stop_gradient(weight).astype(x.dtype), contracted)
    return _with_weight_gradient(product, x, weight)


@jax.custom_vjp
def _with_weight_gradient(product, x, weight):
    """`product` itself. Without this, the gradient of a weight that is cast would be summed as what it is cast to, over
    tokens and over devices. The product stands outside, where a policy of `REMAT` can tell it.
    """
    return product


def _with_weight_gradient_forward(product, x, weight):
    return product, (x, weight)


def _with_weight_gradient_backward(residuals, slope):
    x, weight = residuals
    rows = tuple(range((x.ndim + slope.ndim - weight.ndim) // 2))
    # XLA's CPU backend lacks some products of bfloat16 factors with float32 sums: there the factors are widened.
    x, slope_of_weight = (y.astype(weight.dtype) if platform() == "cpu" else y for y in (x, slope))
    return slope, None, jnp.tensordot(x, slope_of_weight, (rows, rows), preferred_element_type=weight.dtype)


_with_weight_gradient.defvjp(_with_weight_gradient_forward, _with_weight_gradient_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(embedding: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
    """The rows of tokens, in a dtype; their gradients are summed in the dtype of the embedding.

    [vocab, width], [batch, length] int32 -> [batch, length, width].
    """
    # Whole along the width, or the states of all rows would be looked up on every device, a part of the width each.
    return constrain(embedding.astype(dtype), "vocab", None, odd=("vocab",))[tokens]


def _look_up_forward(embedding, tokens, dtype: str):
    return look_up(embedding, tokens, dtype), (embedding, tokens)


def _look_up_backward(dtype: str, residuals, slope):
    embedding, tokens = residuals
    gradient = jnp.zeros_like(embedding).at[tokens].add(slope.astype(embedding.dtype))
    return constrain(gradient, "vocab", None, odd=("vocab",)), None


look_up.defvjp(_look_up_forward, _look_up_backward)


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


class Context(NamedTuple):
    """What all layers of a call share."""

    positions: jax.Array  # [batch, length] int32
    mask: jax.Array  # of the own block of keys, as `attention.Block`
    segment_ids: jax.Array | None  # where `mask` says no more than they do
    prefix_masks: tuple[jax.Array | None, ...]  # [groups, 1, slots] of each prefix
    slot: jax.Array | None  # [] int32: where the cache takes the tokens


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    config: ModelConfig
    keep_keys: bool
    odd: tuple[str, ...]

    @nn.compact
    def __call__(self, x, prefixes: tuple[LayerCache, ...], cache: LayerCache | None, context: Context):
        """Returns (x, keys and values if they are kept): the cache with the new ones or, without one, those alone."""
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
        query = rotate(project(h, w_query), context.positions, c.rope_theta)
        key = rotate(project(h, w_key), context.positions, c.rope_theta)
        own = LayerCache(key, project(h, w_value))
        if cache is not None:
            own = append(cache, own, context.slot)
        scales = (own.key_scale, own.value_scale)
        blocks = [Keys(own.key, own.value, context.mask, *scales, context.segment_ids, causal=cache is None)]
        for prefix, mask in zip(prefixes, context.prefix_masks, strict=True):
            blocks.append(Keys(prefix.key, prefix.value, mask, prefix.key_scale, prefix.value_scale))
        attended = checkpoint_name(attend(query, blocks, c.attention, self.odd), OUTPUT_NAME)
        x = x + project(attended, w_output, contracted=2)

        h = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        x = x + project(jax.nn.silu(project(h, w_gate)) * project(h, w_up), w_down)
        return constrain(x, "batch", "length", None, odd=self.odd), own if self.keep_keys else None


_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_ATTENDED = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)
_HOST = ("device", "pinned_host")
_DOTS_TO_HOST = jax.checkpoint_policies.offload_dot_with_no_batch_dims(*_HOST)
_ATTENDED_TO_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[OUTPUT_NAME], offload_src=_HOST[0], offload_dst=_HOST[1]
)


def _keep_attention(primitive, *operands, **parameters) -> bool:
    fused = primitive.name.startswith("dot_product_attention_fwd")
    return fused or _ATTENDED(primitive, *operands, **parameters)


def _keep_products(primitive, *operands, **parameters) -> bool:
    return _keep_attention(primitive, *operands, **parameters) or _DOTS(primitive, *operands, **parameters)


def _offload_products(primitive, *operands, **parameters):
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True  # what cuDNN's kernel gives has no name to be moved by
    policy = _ATTENDED_TO_HOST if primitive.name == "name" else _DOTS_TO_HOST
    return policy(primitive, *operands, **parameters)


# What a layer keeps for the backward pass, by name; all else is computed again. On a CPU, writing out more than the
# products took longer than computing it again, and half of a step's memory.
REMAT = {
    "products": _keep_products,  # products with weights, and attention's outputs
    "attention": _keep_attention,  # attention's outputs alone
    "full": None,  # nothing but the layer's input
    "offload": _offload_products,  # as products, but in host memory
}


class Decoder(nn.Module):
    """Tokens to final hidden states.

    Arguments of a call:
      tokens: [batch, length] int32.
      segment_ids: [batch, length] int32; 0 marks padding, which nothing attends to, and tokens attend only
        within their own segment. Padding may stand on either side.
      positions: [batch, length] int32 for the rotary embedding, prefixes counted in; left out, they are counted
        within each segment, and no prefix may be given.
      ends: [batch, length] int32; where given, token i sees an earlier token j of its segment only if i < ends[j].
        In a tree laid out depth first, with ends[j] the end of j's subtree, tokens so see their own branch alone.
      prefixes: caches of what comes before the tokens, read and never written. One whose batch is a divisor of
        the tokens' is shared: each of its rows serves as many consecutive ones.
      cache: where given, length is 1, `scan_layers` is False, and the tokens go to slot `cache.length` modulo the
        cache's slots; they see the others that `cache.mask` allows.
      keep_keys: whether to return a cache where none was given.
      odd: of "batch" and "length", what may stay whole where the mesh does not divide it, which is an error else.

    With scan_layers one layer is compiled for stacked weights; without, each layer has weights of its own, so that
    none are cut out of a stack at each decoded token.

    Returns (hidden [batch, length, hidden_size] in the dtype of the computation, cache or None): `cache` with the
    tokens or, where none was given, one of the tokens alone, to serve as a prefix.
    """

    config: ModelConfig
    scan_layers: bool = True

    @nn.compact
    def __call__(
        self,
        tokens,
        segment_ids,
        positions=None,
        ends=None,
        prefixes: tuple[KVCache, ...] = (),
        cache: KVCache | None = None,
        keep_keys: bool = False,
        odd: tuple[str, ...] = (),
    ):
        """See the class."""
        c = self.config
        context = _context(segment_ids, positions, ends, prefixes, cache)
        init = nn.with_logical_partitioning(nn.initializers.normal(c.hidden_size**-0.5), ("vocab", "embed"))
        embedding = self.param("embedding", init, (c.vocab_size, c.hidden_size), jnp.float32)
        x = constrain(look_up(embedding, tokens, c.dtype), "batch", "length", None, odd=odd)
        layer = nn.remat(Layer, prevent_cse=not self.scan_layers, policy=REMAT[c.remat])
        prefixed = tuple(prefix.layers for prefix in prefixes)
        if self.scan_layers:
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=c.num_hidden_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, keep_keys, odd, name="layers")
            x, layers = scanned(x, prefixed, None, context)
        else:
            layers = []
            for i in range(c.num_hidden_layers):
                cached = None if cache is None else cache.layers[i]
                x, own = layer(c, keep_keys or cache is not None, odd, name=f"layer_{i}")(
                    x, tuple(stack[i] for stack in prefixed), cached, context
                )
                layers.append(own)
            layers = tuple(layers)
        if cache is not None:
            cache = KVCache(layers, context.mask[:, 0], cache.length + 1)
        elif keep_keys:
            cache = KVCache(layers, segment_ids > 0, jnp.asarray(tokens.shape[1], jnp.int32))
        return RMSNorm(c.rms_norm_eps, name="final_norm")(x), cache


def _context(segment_ids, positions, ends, prefixes: tuple[KVCache, ...], cache: KVCache | None) -> Context:
    slot, length = None, segment_ids.shape[1]
    if cache is not None:
        slot = cache.length % cache.mask.shape[1]
        mask = jax.lax.dynamic_update_slice(cache.mask, segment_ids > 0, (0, slot))[:, None]
    else:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] > 0)
        mask = mask & jnp.tril(jnp.ones((length, length), bool))
        if ends is not None:
            mask = mask & (jnp.arange(length)[:, None] < ends[:, None, :])
    if positions is None:
        positions = segment_positions(segment_ids)
    told = segment_ids if cache is None and ends is None else None
    prefix_masks = tuple(None if prefix.mask is None else prefix.mask[:, None] for prefix in prefixes)
    return Context(positions, mask, told, prefix_masks, slot)


class LanguageModel(nn.Module):
    """The decoder and, where embeddings are not tied, an output matrix.

    A call returns hidden states, not logits: callers take the logits they need through `unembedding`.
    """

    config: ModelConfig
    scan_layers: bool = True

    @nn.compact
    def __call__(
        self, tokens, segment_ids, positions=None, ends=None, prefixes=(), cache=None, keep_keys: bool = False, odd=()
    ):
        """As `Decoder`."""
        if not self.config.tie_word_embeddings:
            shape = (self.config.hidden_size, self.config.vocab_size)
            _weight(self, "lm_head", shape, ("embed", "vocab"), self.config.hidden_size)
        decoder = Decoder(self.config, self.scan_layers, name="decoder")
        return decoder(tokens, segment_ids, positions, ends, prefixes, cache, keep_keys, odd)


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
