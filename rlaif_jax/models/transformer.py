"""The decoder and its two uses: a language model and a scalar model (reward, value).

One architecture serves policy, reference, value network, reward model and local judge, under different parameter trees;
families (Llama, Gemma, GPT-2 ...) differ by data. Modules are used only through `init` and `apply`; parameters are
plain nested dicts, with the layers stacked along a leading axis and scanned.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from rlaif_jax.models.attention import OUTPUT_NAME, attend, soft_capped
from rlaif_jax.models.attention import Block as Keys
from rlaif_jax.models.cache import KVCache, LayerCache, append
from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.products import look_up, project
from rlaif_jax.models.rotary import NO_SCALING, RopeScaling, rope_frequencies, rotate
from rlaif_jax.parallel.mesh import constrain


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, by the names of Hugging Face's configs, where 0 and () are what a model does not have."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float  # also of norms with a mean
    tie_word_embeddings: bool
    family: str = "llama"  # a name in families.FAMILIES
    rope_scaling: RopeScaling = NO_SCALING
    partial_rotary_factor: float = 1.0  # the share of head_dim that is rotated
    no_rope_layers: tuple[int, ...] = ()  # numbers of the layers that do not rotate
    sliding_window: int = 0  # tokens that a token sees, itself included
    full_attention_layers: tuple[int, ...] = ()  # numbers of the layers that see all in spite of sliding_window
    rope_local_base_freq: float = 0.0  # in place of rope_theta and its scaling, where the window slides
    query_pre_attn_scalar: float = 0.0  # queries are divided by its root, not by that of head_dim
    attn_logit_softcapping: float = 0.0  # scores x become cap * tanh(x / cap)
    final_logit_softcapping: float = 0.0  # and logits
    lora_scale: float = 0.0  # what the products of an adapter count, where the parameters have one (models/lora.py)
    remat: str = "products"  # a name in REMAT: what is kept for the backward pass, and what computed again
    attention: str = "auto"  # a name in attention.IMPLEMENTATIONS
    dtype: str = "float32"  # of the computation; parameters, softmax and norms stay float32


def _weight(module: nn.Module, name: str, shape, axes, fan_in: int) -> jax.Array:
    """Declares one weight: shape, logical axes, and a normal initialiser of variance 1 / fan_in."""
    init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)
    return module.param(name, init, shape, jnp.float32)


class Norm(nn.Module):
    """A norm over the last axis, in float32: x / rms(x) * scale (Zhang & Sennrich, arXiv 1910.07467), where a family
    has it * (1 + scale), or (x - mean) / deviation * scale + bias (Ba et al., arXiv 1607.06450).
    """

    kind: str  # as `Family.norm`
    eps: float
    axis: str = "embed"  # the logical axis of its weights

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> the same shape and dtype."""
        plus_one, zeros = self.kind == "rms_plus_one", nn.initializers.zeros
        init = nn.with_logical_partitioning(zeros if plus_one else nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        normed = normed * (1 + scale if plus_one else scale)
        if self.kind == "layer":
            normed += self.param("bias", nn.with_logical_partitioning(zeros, (self.axis,)), scale.shape, jnp.float32)
        return normed.astype(x.dtype)


class Context(NamedTuple):
    """What all layers of a call share."""

    positions: jax.Array  # [batch, length] int32
    mask: jax.Array  # of the own block of keys, as `attention.Block`
    segment_ids: jax.Array | None  # where `mask` says no more than they do
    key_positions: jax.Array | None  # [batch, slots] int32 of the own block, where a window slides
    prefix_masks: tuple[jax.Array | None, ...]  # [groups, 1, slots] of each prefix
    prefix_positions: tuple[jax.Array | None, ...]  # [groups, slots] int32 of each
    slot: jax.Array | None  # [] int32: where the cache takes the tokens


class LayerKind(NamedTuple):
    """In what layers of a decoder differ: numbers, so that all of them are one program."""

    frequencies: jax.Array  # [rotated dimensions / 2] float32: radians a position
    window: jax.Array | int | None  # tokens that a token sees; None where there is no window in any layer


NO_WINDOW = 1 << 30
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": jax.nn.gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def layer_kind(c: ModelConfig, number: int, window: bool) -> LayerKind:
    """That of a layer. window: whether the call has anything that lies beyond a window."""
    slides = bool(c.sliding_window) and number not in c.full_attention_layers
    local = slides and c.rope_local_base_freq
    theta, scaling = (c.rope_local_base_freq, NO_SCALING) if local else (c.rope_theta, c.rope_scaling)
    frequencies = rope_frequencies(int(c.head_dim * c.partial_rotary_factor), theta, scaling)
    if number in c.no_rope_layers or FAMILIES[c.family].learned_positions:
        frequencies = jnp.zeros_like(frequencies)
    return LayerKind(frequencies, (c.sliding_window if slides else NO_WINDOW) if window else None)


def _one_kind(c: ModelConfig) -> bool:
    """Whether all layers are alike."""
    every, some = range(c.num_hidden_layers), (set(c.no_rope_layers), set(c.full_attention_layers))
    return all(not numbers.intersection(every) or numbers.issuperset(every) for numbers in some)


class Layer(nn.Module):
    """One decoder layer."""

    config: ModelConfig
    keep_keys: bool
    odd: tuple[str, ...]

    @nn.compact
    def __call__(
        self, x, prefixes: tuple[LayerCache, ...], cache: LayerCache | None, context: Context, kind: LayerKind
    ):
        """Returns (x, keys and values if they are kept): the cache with the new ones or, without one, those alone."""
        family = FAMILIES[self.config.family]
        attended, own = self._attend(self._norm("attention_norm", x), prefixes, cache, context, kind)
        if family.post_norms:
            attended = self._norm("post_attention_norm", attended)
        read, x = x, x + attended
        mlp = self._mlp(self._norm("mlp_norm", read if family.parallel else x))
        if family.post_norms:
            mlp = self._norm("post_mlp_norm", mlp)
        return constrain(x + mlp, "batch", "length", None, odd=self.odd), own if self.keep_keys else None

    def _attend(self, h, prefixes, cache, context: Context, kind: LayerKind):
        c, family = self.config, FAMILIES[self.config.family]
        heads, kv_heads = (c.num_attention_heads, c.head_dim), (c.num_key_value_heads, c.head_dim)
        query = self._product("query", h, heads, ("heads", "head_dim"))
        key = self._product("key", h, kv_heads, ("kv_heads", "head_dim"))
        value = self._product("value", h, kv_heads, ("kv_heads", "head_dim"))
        if family.query_key_norm:
            query, key = (self._norm(f"{name}_norm", x, "head_dim") for name, x in (("query", query), ("key", key)))
        if not family.learned_positions:
            query, key = (rotate(x, context.positions, kind.frequencies) for x in (query, key))
        if c.query_pre_attn_scalar:
            query = query * (c.head_dim / c.query_pre_attn_scalar) ** 0.5  # `attend` divides by the root of head_dim
        own = LayerCache(key, value)
        if cache is not None:
            own = append(cache, own, context.slot)
        scales, segment_ids = (own.key_scale, own.value_scale), context.segment_ids if kind.window is None else None
        near = functools.partial(_within, kind.window, context.positions)
        mask = near(context.mask, context.key_positions)
        blocks = [Keys(own.key, own.value, mask, *scales, segment_ids, causal=cache is None)]
        for prefix, mask, positions in zip(prefixes, context.prefix_masks, context.prefix_positions, strict=True):
            blocks.append(Keys(prefix.key, prefix.value, near(mask, positions), prefix.key_scale, prefix.value_scale))
        attended = attend(query, blocks, c.attention, self.odd, c.attn_logit_softcapping)
        attended = checkpoint_name(attended, OUTPUT_NAME)
        return self._product("output", attended, (c.hidden_size,), ("embed",), ("heads", "head_dim"), True), own

    def _mlp(self, h):
        c, family = self.config, FAMILIES[self.config.family]
        width, activation = (c.intermediate_size,), ACTIVATIONS[family.activation]
        gate = activation(self._product("gate", h, width, ("mlp",))) if family.gated else None
        up = self._product("up", h, width, ("mlp",))
        up = activation(up) if gate is None else gate * up
        return self._product("down", up, (c.hidden_size,), ("embed",), ("mlp",), True)

    def _norm(self, name: str, x, axis: str = "embed"):
        return Norm(FAMILIES[self.config.family].norm, self.config.rms_norm_eps, axis, name=name)(x)

    def _product(self, name: str, x, to, to_axes, axes=("embed",), writes: bool = False):
        """x times the weight `name`, [*in, *to], with what its adapter and its bias add where there are any.

        writes: the result goes to the residual stream, which is to keep its size whatever the depth (GPT-2).
        """
        c, inputs = self.config, x.shape[x.ndim - len(axes) :]
        fan_in = math.prod(inputs) * (2 * c.num_hidden_layers if writes else 1)
        weight = _weight(self, name, (*inputs, *to), (*axes, *to_axes), fan_in)
        y = project(x, weight, contracted=len(axes))
        adapter = self.get_variable("params", "lora", {}).get(name)
        if adapter:
            y = y + c.lora_scale * project(project(x, adapter["a"], contracted=len(axes)), adapter["b"])
        if name in FAMILIES[c.family].biases:
            init = nn.with_logical_partitioning(nn.initializers.zeros, to_axes)
            # Added in float32, so that its gradient is a sum in float32.
            y = (y.astype(jnp.float32) + self.param(f"{name}_bias", init, to, jnp.float32)).astype(y.dtype)
        return y


def _within(window, positions: jax.Array, mask: jax.Array | None, key_positions: jax.Array | None) -> jax.Array | None:
    """The mask of a block (`attention.Block`), without keys that are `window` positions or more before a query's."""
    if window is None:
        return mask
    groups = len(key_positions)  # each of consecutive rows
    near = positions.reshape(groups, -1, 1) - key_positions[:, None] < window
    return near if mask is None else near & mask


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
        # Of the tokens alone there is nothing beyond a window that is as long as they are.
        beyond = bool(prefixes) or cache is not None or tokens.shape[1] > c.sliding_window
        window = bool(c.sliding_window) and beyond
        context = _context(segment_ids, positions, ends, prefixes, cache, window)
        x = constrain(self._embed(tokens, context.positions), "batch", "length", None, odd=odd)
        layer = nn.remat(Layer, prevent_cse=not self.scan_layers, policy=REMAT[c.remat])
        prefixed = tuple(prefix.layers for prefix in prefixes)
        numbers, alike = range(c.num_hidden_layers), _one_kind(c)
        kinds = [layer_kind(c, 0, window)] * len(numbers) if alike else [layer_kind(c, i, window) for i in numbers]
        if self.scan_layers:
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast if alike else 0),
                length=c.num_hidden_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, keep_keys, odd, name="layers")
            kind = kinds[0] if alike else jax.tree.map(lambda *x: jnp.stack(x), *kinds)
            x, layers = scanned(x, prefixed, None, context, kind)
        else:
            layers = []
            for i, kind in enumerate(kinds):
                cached = None if cache is None else cache.layers[i]
                x, own = layer(c, keep_keys or cache is not None, odd, name=f"layer_{i}")(
                    x, tuple(stack[i] for stack in prefixed), cached, context, kind
                )
                layers.append(own)
            layers = tuple(layers)
        if cache is not None:
            cache = KVCache(layers, context.mask[:, 0], cache.length + 1, context.key_positions)
        elif keep_keys:
            kept = context.positions if c.sliding_window else None
            cache = KVCache(layers, segment_ids > 0, jnp.asarray(tokens.shape[1], jnp.int32), kept)
        return Norm(FAMILIES[c.family].norm, c.rms_norm_eps, name="final_norm")(x), cache

    def _embed(self, tokens, positions) -> jax.Array:
        c, family = self.config, FAMILIES[self.config.family]

        def embedded(name: str, axis: str, rows: int, numbers) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(c.hidden_size**-0.5), (axis, "embed"))
            return look_up(self.param(name, init, (rows, c.hidden_size), jnp.float32), numbers, c.dtype, axis)

        x = embedded("embedding", "vocab", c.vocab_size, tokens)
        if family.scaled_embedding:
            x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
        if family.learned_positions:
            x = x + embedded("position_embedding", "positions", c.max_position_embeddings, positions)
        return x


def _context(segment_ids, positions, ends, prefixes: tuple[KVCache, ...], cache: KVCache | None, window) -> Context:
    slot, length = None, segment_ids.shape[1]
    if positions is None:
        positions = segment_positions(segment_ids)
    key_positions = positions if window else None
    if cache is not None:
        slot = cache.length % cache.mask.shape[1]
        mask = jax.lax.dynamic_update_slice(cache.mask, segment_ids > 0, (0, slot))[:, None]
        if window:
            key_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, slot))
    else:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] > 0)
        mask = mask & jnp.tril(jnp.ones((length, length), bool))
        if ends is not None:
            mask = mask & (jnp.arange(length)[:, None] < ends[:, None, :])
    told = segment_ids if cache is None and ends is None else None
    prefix_masks = tuple(None if prefix.mask is None else prefix.mask[:, None] for prefix in prefixes)
    prefix_positions = tuple(prefix.positions for prefix in prefixes)
    return Context(positions, mask, told, key_positions, prefix_masks, prefix_positions, slot)


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


HEAD = ("kernel", "bias")  # of a ScalarModel, beside its decoder


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


def next_token_logits(model: LanguageModel, parameters, hidden: jax.Array) -> jax.Array:
    """[..., hidden_size] -> [..., vocab_size] float32."""
    matrix = unembedding(parameters).astype(hidden.dtype)
    logits = jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)
    return soft_capped(logits, model.config.final_logit_softcapping)


def unembedding(parameters) -> jax.Array:
    """The output matrix [hidden_size, vocab_size] of a LanguageModel's parameters."""
    return parameters["lm_head"] if "lm_head" in parameters else parameters["decoder"]["embedding"].T
