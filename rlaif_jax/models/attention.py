"""Attention of queries over one or more blocks of keys: plain XLA, cuDNN on GPUs, splash attention on TPUs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlaif_jax.parallel.mesh import RULES, partition_spec, platform

MASKED = -1e30  # finite, so that a query with nothing to attend to gives no NaN
IMPLEMENTATIONS = ("auto", "plain", "cudnn", "splash")
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


def attend(query: jax.Array, blocks: list[Block], implementation: str) -> jax.Array:
    """Grouped-query attention, softmax in float32 over the keys of all blocks together.

    query: [batch, length, heads, head_dim]. Returns the same shape.
    """
    batch, length, heads, head_dim = query.shape
    chosen = choose_implementation(implementation, query, blocks)
    if chosen == "splash":
        return _splash(query, blocks[0])
    attend_block = _cudnn if chosen == "cudnn" else _plain_in_parts
    parts = [attend_block(query.reshape(len(block.key), -1, heads, head_dim), block) for block in blocks]
    if len(parts) == 1:
        return parts[0][0].reshape(query.shape)
    outputs = [output.reshape(query.shape) for output, _ in parts]
    sums = jnp.stack([log_sum.reshape(batch, length, heads) for _, log_sum in parts])
    # A softmax over all keys is the softmaxes of the blocks, each weighted by its share of the sum.
    shares = jax.nn.softmax(sums, axis=0)[..., None].astype(query.dtype)
    return sum(share * output for share, output in zip(shares, outputs, strict=True))


def choose_implementation(implementation: str, query: jax.Array, blocks: list[Block]) -> str:
    """The path that "auto" takes, by platform and by what its kernels can do; any other name stands.

    Decoding one token is bound by reading the keys, which the plain path does as well as any.
    """
    if implementation != "auto":
        return "plain" if implementation == "splash" and not _splash_fits(query, blocks) else implementation
    here, head_dim = platform(), query.shape[-1]
    half = query.dtype in (jnp.bfloat16, jnp.float16) and all(block.key_scale is None for block in blocks)
    if here == "gpu" and query.shape[1] > 1 and half and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "splash" if here == "tpu" and _splash_fits(query, blocks) else "plain"


def _plain_in_parts(query: jax.Array, block: Block) -> tuple[jax.Array, jax.Array]:
    """As `_plain`, leaving out most of what a causal mask hides: queries by quarters, each with the keys up to it."""
    queries = query.shape[1]
    if not block.causal or queries < _SHORTEST_IN_PARTS:
        return _plain(query, block)
    size = -(-queries // _PARTS)
    parts = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        seen = block._replace(key=block.key[:, :end], value=block.value[:, :end], mask=block.mask[:, start:end, :end])
        parts.append(_plain(query[:, start:end], seen))
    return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))


def _plain(query: jax.Array, block: Block) -> tuple[jax.Array, jax.Array]:
    """query: [groups, queries, heads, head_dim]. Returns (output of that shape, log-sum-exp of the scores)."""
    groups, queries, heads, head_dim = query.shape
    kv_heads = block.key.shape[-2]
    grouped = query.reshape(groups, queries, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    # The order of dimensions is the one in which the products come out, so that no scores are transposed.
    scores = jnp.einsum("bqkgh,bskh->bkqgs", grouped, block.key.astype(query.dtype)).astype(jnp.float32)
    if block.key_scale is not None:
        scores *= _per_slot(block.key_scale)
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


def _splash(query: jax.Array, block: Block) -> jax.Array:
    """Splash attention on each device's own rows and heads; interpreted where there is no TPU."""
    length = query.shape[1]
    padding = -length % _SPLASH_SIZES[-1]
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, block.key, block.value))
    segment_ids = jnp.pad(block.segment_ids, ((0, 0), (0, padding)))
    kernel, mesh = _splash_rows, jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # Mosaic kernels can't be partitioned automatically
        spec = partition_spec(("batch", None, "kv_heads", None), key.shape, mesh, replicated=tuple(RULES))
        specs = (spec, spec, spec, PartitionSpec(spec[0], None))
        kernel = jax.shard_map(kernel, in_specs=specs, out_specs=spec, check_vma=False)
    return kernel(query, key, value, segment_ids)[:, :length]


def _splash_rows(query, key, value, segment_ids):
    # Slow to import, and needed for this kernel alone.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads, head_dim = query.shape[1:]
    size = next(size for size in _SPLASH_SIZES if length % size == 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(*[size] * 8),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=OUTPUT_NAME,
        interpret=platform() != "tpu",
    )

    def row(query, key, value, segment_ids):
        segments = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
        return kernel(*(jnp.moveaxis(x, 1, 0) for x in (query, key, value)), segment_ids=segments)

    return jnp.moveaxis(jax.vmap(row)(query * head_dim**-0.5, key, value, segment_ids), 1, 2)
