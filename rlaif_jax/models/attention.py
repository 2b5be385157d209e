"""Attention of queries over one or more blocks of keys: plain XLA, cuDNN on GPUs, splash attention on TPUs."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.parallel.mesh import RULES, constrain, partition_spec, platform, splits_batch, splits_length

MASKED = -1e30  # finite, so that a query with nothing to attend to gives no NaN
IMPLEMENTATIONS = ("auto", "plain", "cudnn", "splash")
_CHECKED = ("heads", "kv_heads")  # stay whole only where a config lists them, for the weights' placement has seen to it
OUTPUT_NAME = "attention_output"  # of what the backward pass may keep, see jax.ad_checkpoint.checkpoint_name
_PARTS, _SHORTEST_IN_PARTS = 4, 128  # measured on a CPU at lengths of 64 to 1,024
_SPLASH_SIZES = (512, 256, 128)  # tiles; the kernel takes lengths that one of them divides


class Block(NamedTuple):
    """Keys that queries attend to. Each of the `groups` serves batch / groups consecutive rows without a copy."""

    key: jax.Array  # [groups, slots, kv_heads, head_dim]
    value: jax.Array  # [groups, slots, kv_heads, head_dim]
    mask: jax.Array | None = None  # [groups, queries or 1, slots] bool; None where all slots count
    key_scale: jax.Array | None = None  # [groups, slots, kv_heads] float32, of int8 keys
    value_scale: jax.Array | None = None
    segment_ids: jax.Array | None = None  # [groups, slots] int32, where mask says just: causal and of one segment
    causal: bool = False  # the mask lets no query see a later slot, of as many slots as queries


def attend(
    query: jax.Array, blocks: list[Block], implementation: str, odd: tuple[str, ...] = (), cap: float = 0.0
) -> jax.Array:
    """Grouped-query attention, softmax in float32 over the keys of all blocks together.

    Where the mesh splits the length, queries stay split and every device gets the keys and values of all of it.

    query: [batch, length, heads, head_dim]. odd: as of `constrain`. cap: of the scores, as `soft_capped`; only the
    plain path has it. Returns the same shape.
    """
    batch, length, heads, head_dim = query.shape
    chosen = "plain" if cap else choose_implementation(implementation, query, blocks)
    if chosen == "splash":
        return _splash(query, blocks[0], odd)
    if _is_split(query):
        query = constrain(query, "batch", "length", "heads", None, odd=(*odd, *_CHECKED))
        parts = [_plain_by_row(query, _whole(block, odd), cap) for block in blocks]
    else:
        # cuDNN's kernel wants rows to lie where their keys do: not those of a prefix that rows of all devices share.
        by_cudnn = [chosen == "cudnn" and (len(block.key) == batch or not splits_batch()) for block in blocks]
        plain = functools.partial(_plain_in_parts, cap=cap)
        parts = [
            (_cudnn if fused else plain)(query.reshape(len(block.key), -1, heads, head_dim), block)
            for fused, block in zip(by_cudnn, blocks, strict=True)
        ]
    if len(parts) == 1:
        return parts[0][0].reshape(query.shape)
    outputs = [output.reshape(query.shape) for output, _ in parts]
    sums = jnp.stack([log_sum.reshape(batch, length, heads) for _, log_sum in parts])
    # A softmax over all keys is the softmaxes of the blocks, each weighted by its share of the sum.
    shares = jax.nn.softmax(sums, axis=0)[..., None].astype(query.dtype)
    return sum(share * output for share, output in zip(shares, outputs, strict=True))


def soft_capped(x: jax.Array, cap: float) -> jax.Array:
    """x, held between -cap and cap without a kink (Gemma 2, arXiv 2408.00118, section 2); 0 leaves it as it is."""
    return cap * jnp.tanh(x / cap) if cap else x


def choose_implementation(implementation: str, query: jax.Array, blocks: list[Block]) -> str:
    """The path that "auto" takes, by platform and by what its kernels can do; any other name stands where it can.

    Decoding one token is bound by reading the keys, which the plain path does as well as any. cuDNN's kernel can't be
    split along the length.
    """
    if implementation == "cudnn" and _is_split(query):
        return "plain"
    if implementation != "auto":
        return "plain" if implementation == "splash" and not _splash_fits(query, blocks) else implementation
    here, head_dim = platform(), query.shape[-1]
    half = query.dtype in (jnp.bfloat16, jnp.float16) and all(block.key_scale is None for block in blocks)
    if here == "gpu" and query.shape[1] > 1 and half and head_dim % 8 == 0 and head_dim <= 128:
        return "plain" if _is_split(query) else "cudnn"
    return "splash" if here == "tpu" and _splash_fits(query, blocks) else "plain"


def _is_split(query: jax.Array) -> bool:
    return query.shape[1] > 1 and splits_length()


def _whole(block: Block, odd: tuple[str, ...]) -> Block:
    """A block with keys and values that are whole along their length on every device."""
    pin = functools.partial(constrain, odd=(*odd, *_CHECKED))

    def whole(x):
        if block.causal:  # just computed: each device makes its part of them, and they are gathered, not what made them
            x = pin(x, "batch", "length", "kv_heads", None)
        return pin(x, "batch", None, "kv_heads", None)

    return block._replace(key=whole(block.key), value=whole(block.value))


def _plain_by_row(query: jax.Array, block: Block, cap: float) -> tuple[jax.Array, jax.Array]:
    """As `_plain`, of [batch, length, heads, head_dim]: both are split, so they are not made one dimension."""
    rows, mask = query.reshape(len(block.key), -1, *query.shape[1:]), block.mask
    one = lambda row, mask: _plain(row, block._replace(mask=mask), cap)  # noqa: E731
    if mask is None or mask.shape[1] in (1, query.shape[1]):
        return jax.vmap(one, (1, None), 1)(rows, mask)
    return jax.vmap(one, 1, 1)(rows, mask.reshape(*rows.shape[:3], -1))


def _plain_in_parts(query: jax.Array, block: Block, cap: float) -> tuple[jax.Array, jax.Array]:
    """As `_plain`, leaving out most of what a causal mask hides: queries by quarters, each with the keys up to it."""
    queries = query.shape[1]
    if not block.causal or queries < _SHORTEST_IN_PARTS:
        return _plain(query, block, cap)
    size = -(-queries // _PARTS)
    parts = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        seen = block._replace(key=block.key[:, :end], value=block.value[:, :end], mask=block.mask[:, start:end, :end])
        parts.append(_plain(query[:, start:end], seen, cap))
    return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))


def _plain(query: jax.Array, block: Block, cap: float) -> tuple[jax.Array, jax.Array]:
    """query: [groups, queries, heads, head_dim]. Returns (output of that shape, log-sum-exp of the scores)."""
    groups, queries, heads, head_dim = query.shape
    kv_heads = block.key.shape[-2]
    grouped = query.reshape(groups, queries, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    # The order of dimensions is the one in which the products come out, so that no scores are transposed.
    scores = jnp.einsum("bqkgh,bskh->bkqgs", grouped, block.key.astype(query.dtype)).astype(jnp.float32)
    if block.key_scale is not None:
        scores *= _per_slot(block.key_scale)
    scores = soft_capped(scores, cap)
    if block.mask is not None:
        scores = jnp.where(block.mask[:, None, :, None], scores, MASKED)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    log_sum = (largest + jnp.log(total))[..., 0]
    if block.value_scale is not None:
        weights *= _per_slot(block.value_scale)
    output = jnp.einsum("bkqgs,bskh->bkqgh", weights.astype(query.dtype), block.value.astype(query.dtype))
    output = jnp.moveaxis(output / total.astype(query.dtype), 1, 2)
    return output.reshape(query.shape), jnp.moveaxis(log_sum, 1, 2).reshape(groups, queries, heads)


def _per_slot(scale: jax.Array) -> jax.Array:
    """[groups, slots, kv_heads] -> [groups, kv_heads, 1, 1, slots]."""
    return jnp.moveaxis(scale, 2, 1)[:, :, None, None]


def _cudnn(query: jax.Array, block: Block) -> tuple[jax.Array, jax.Array]:
    """As `_plain`, by cuDNN's fused kernel."""
    mask = None if block.mask is None else block.mask[:, None]
    return jax.nn.dot_product_attention(
        query, block.key, block.value, mask=mask, implementation="cudnn", return_residual=True
    )


def _splash_fits(query: jax.Array, blocks: list[Block]) -> bool:
    """The kernel takes a whole sequence by itself, under a mask that its segments tell."""
    return len(blocks) == 1 and blocks[0].segment_ids is not None and query.shape[1] > 1


def _splash(query: jax.Array, block: Block, odd: tuple[str, ...]) -> jax.Array:
    """Splash attention on each device's own rows, heads and queries; interpreted where there is no TPU."""
    length, mesh = query.shape[1], jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in RULES["length"])
    padding = -length % (shards * _SPLASH_SIZES[-1])
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, block.key, block.value))
    segment_ids = jnp.pad(block.segment_ids, ((0, 0), (0, padding)))
    kernel, run = _splash_kernel(*query.shape[1:3], shards), _splash_rows
    if not mesh.empty:  # Mosaic kernels can't be partitioned automatically
        axes = ("batch" if len(key) > 1 else None, "length", "kv_heads", None)  # one row is not split
        batch, queries, heads, _ = partition_spec(axes, key.shape, mesh, (*odd, *_CHECKED))
        of_query, of_key = PartitionSpec(batch, queries, heads, None), PartitionSpec(batch, None, heads, None)
        of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, queries)))
        segments = PartitionSpec(batch, queries), PartitionSpec(batch, None)
        specs = (of_kernel, of_query, of_key, of_key, *segments)
        run = jax.shard_map(run, in_specs=specs, out_specs=of_query, check_vma=False)
    return run(kernel, query, key, value, segment_ids, segment_ids)[:, :length]


def _splash_kernel(length: int, heads: int, shards: int):
    """The kernel for causal attention of so many queries, which come in this many shards."""
    # Slow to import, and needed for this kernel alone.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    size = next(size for size in _SPLASH_SIZES if length // shards % size == 0)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(*[size] * 8),
        head_shards=1,  # all heads have one mask
        q_seq_shards=shards,
        residual_checkpoint_name=OUTPUT_NAME,
        interpret=platform() != "tpu",
    )


def _splash_rows(kernel, query, key, value, query_segments, key_segments):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    def row(query, key, value, *segments):
        return kernel(*(jnp.moveaxis(x, 1, 0) for x in (query, key, value)), segment_ids=SegmentIds(*segments))

    scaled = query * query.shape[-1] ** -0.5
    return jnp.moveaxis(jax.vmap(row)(scaled, key, value, query_segments, key_segments), 1, 2)
