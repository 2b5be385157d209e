"""Continuous batching: a fixed number of slots decode, and a finished reply gives its slot to the next in the queue.

The host looks in every `chunk` tokens; in between, everything happens in one compiled program.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlaif_jax.errors import UserError
from rlaif_jax.models.cache import KVCache, empty_cache, split_rows
from rlaif_jax.models.parameters import Placement
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.processes import put, to_host
from rlaif_jax.sampling.buckets import bucket_of, length_buckets
from rlaif_jax.sampling.decode import Replies, choose, decode, new_replies, prefill, row_keys
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.stopping import Stopping


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How replies are sampled. Nothing here changes them beyond rounding, but for `cache_dtype`."""

    slots: int  # replies decoded at a time
    refill: int  # prompts read at a time, as soon as slots for all of them are free
    chunk: int  # tokens between two looks at which replies are done
    prompt_buckets: int  # different lengths that prompts are padded to
    bucket_multiple: int  # what all these lengths are multiples of
    cache_dtype: str  # of keys and values: float32, bfloat16 or int8; "" is that of the computation


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A language model ready to sample."""

    model: LanguageModel  # of `models.parameters.decoding_model`
    parameters: dict  # of `models.parameters.decoding_parameters`
    placement: Placement
    stopping: Stopping
    sampling: SamplingConfig
    max_new_tokens: int
    config: SamplerConfig
    prefix: KVCache | None = None  # of one row: what stands before every prompt

    @property
    def prefixes(self) -> tuple[KVCache, ...]:
        """What every prompt is read after."""
        return () if self.prefix is None else (self.prefix,)

    @property
    def cache_dtype(self) -> str:
        """The dtype of the keys and values kept."""
        return self.config.cache_dtype or self.model.config.dtype


class Slots(struct.PyTreeNode):
    """The replies in the making, and the prompts that they answer."""

    replies: Replies
    prompts: KVCache


class Reply(NamedTuple):
    """A finished reply, on the host."""

    tokens: np.ndarray  # [length] int32, the token that ends it kept
    logprobs: np.ndarray  # [length] float32, of the distribution sampled from
    raw_logprobs: np.ndarray  # [length] float32, at temperature 1 and unfiltered
    ended: bool  # by an end of sequence or a stop string, not by the limit
    conclusion: np.ndarray | None  # what `conclude` said of it


def sample(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    row_ids: Sequence[int],
    done: Collection[int] = (),
    conclude: Callable[[Slots], jax.Array] | None = None,
) -> Iterator[tuple[int, Reply]]:
    """Samples replies; yields (row, reply) as they finish.

    As many consecutive rows as there are row ids for each prompt reply to it, which is then read once. A reply depends
    on its prompt, on the key and on its row's id alone. Prompts numbered in `done` are left out. `conclude` looks at
    the slots when replies have finished, and returns [slots, ...]. Raises UserError where the slots do not hold all
    replies to a prompt.
    """
    if not prompts:
        return
    config, copies = sampler.config, len(row_ids) // len(prompts)
    if copies * len(prompts) != len(row_ids) or not all(map(len, prompts)):
        raise ValueError(f"{len(row_ids)} row ids for {len(prompts)} prompts, of which none may be empty")
    if copies > config.slots:
        raise UserError(f"sampler.slots={config.slots} must be at least {copies}, the replies to a prompt")
    buckets = length_buckets([len(prompt) for prompt in prompts], config.prompt_buckets, config.bucket_multiple)
    queue = collections.deque(i for i in range(len(prompts)) if i not in done)
    occupants: dict[int, int] = {}  # slot -> the row whose reply it makes
    slots = _empty(sampler, buckets[-1])
    read = max(min(config.refill, config.slots // copies), 1)
    finished: list[tuple[int, Reply]] = []
    while queue or occupants:
        free = [slot for slot in range(config.slots) if slot not in occupants]
        while queue and len(free) >= copies * min(read, len(queue)):
            chosen = [queue.popleft() for _ in range(min(read, len(queue)))]
            rows = [copies * prompt + copy for prompt in chosen for copy in range(copies)]
            taken, free = free[: len(rows)], free[len(rows) :]
            occupants |= dict(zip(taken, rows, strict=True))
            ids = [row_ids[row] for row in rows]
            slots = _refill(sampler, slots, [prompts[i] for i in chosen], buckets, taken, ids, read, key)
        slots = advance(sampler.model, sampler.parameters, slots, sampler.prefixes, sampler.stopping,
                         sampling=sampler.sampling, chunk=config.chunk)  # fmt: skip
        yield from finished  # the caller's work on them goes on while the device decodes
        finished = _collect(slots, occupants, conclude)
    yield from finished


def _collect(
    slots: Slots, occupants: dict[int, int], conclude: Callable[[Slots], jax.Array] | None
) -> list[tuple[int, Reply]]:
    """The replies that are done, whose slots are then free."""
    done = to_host(slots.replies.done)
    ready = [slot for slot in occupants if done[slot]]
    if not ready:
        return []
    conclusions = conclude(slots) if conclude else None
    samples, length, ended, conclusions = to_host(
        (slots.replies.samples, slots.replies.length, slots.replies.ended, conclusions)
    )
    finished = []
    for slot in ready:
        texts = (x[slot, : length[slot]] for x in (samples.tokens, samples.logprobs, samples.raw_logprobs))
        conclusion = None if conclusions is None else conclusions[slot]
        finished.append((occupants.pop(slot), Reply(*texts, bool(ended[slot]), conclusion)))
    return finished


def _refill(sampler, slots, prompts, buckets, taken, row_ids, read, key) -> Slots:
    """Reads prompts into the slots `taken`, at once; what is missing to `read` prompts is made up and dropped."""
    copies, bucket = len(taken) // len(prompts), bucket_of(max(map(len, prompts)), buckets)
    tokens, mask = np.zeros((read, bucket), np.int32), np.zeros((read, bucket), bool)
    for i, prompt in enumerate(prompts):
        tokens[i, bucket - len(prompt) :], mask[i, bucket - len(prompt) :] = prompt, True
    nowhere = [sampler.config.slots] * (read * copies - len(taken))
    where = np.array([*taken, *nowhere], np.int32)
    ids = np.array([*row_ids] + [0] * len(nowhere), np.int32)
    arrays = [put(x, sampler.placement.whole) for x in (tokens, mask, where, ids)]
    return insert(sampler.model, sampler.parameters, slots, sampler.prefixes, sampler.stopping, *arrays, key,
                   sampling=sampler.sampling, cache_dtype=sampler.cache_dtype)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "sampling", "cache_dtype"), donate_argnames="slots")
def insert(
    model, parameters, slots: Slots, prefixes, stopping, tokens, mask, where, row_ids, key, *, sampling, cache_dtype
) -> Slots:
    """Prompts [read, length] into the slots `where` [rows], rows / read consecutive ones for each prompt."""
    logits, prompt = prefill(model, parameters, tokens, mask, prefixes, cache_dtype)
    copied = functools.partial(jnp.repeat, repeats=len(where) // len(tokens), axis=0)
    before = sum(prefix.slots for prefix in prefixes)
    lengths = before + copied(jnp.sum(mask, axis=1, dtype=jnp.int32))
    limit = slots.replies.samples.tokens.shape[1]
    new = new_replies(lengths, row_keys(key, row_ids), limit, stopping, cache=None)
    new = choose(new, copied(logits), sampling, stopping)

    def put(old, x):  # the slots' own arrays may be longer than a bucket of prompts
        return old.at[where, : x.shape[1]].set(x, mode="drop") if x.ndim > 1 else old.at[where].set(x, mode="drop")

    old, cache = slots.replies, slots.replies.cache
    replies = jax.tree.map(put, old.replace(cache=None), new)
    cache = cache.replace(mask=cache.mask.at[where].set(False, mode="drop"))
    layers = jax.tree.map(lambda old, x: put(old, copied(x)), slots.prompts.layers, prompt.layers)
    layers = tuple(map(split_rows, layers))
    padded = jnp.pad(copied(mask), ((0, 0), (0, slots.prompts.mask.shape[1] - mask.shape[1])))
    positions = None if prompt.positions is None else put(slots.prompts.positions, copied(prompt.positions))
    prompts = slots.prompts.replace(layers=layers, mask=put(slots.prompts.mask, padded), positions=positions)
    return Slots(replies.replace(cache=cache), prompts)


@functools.partial(jax.jit, static_argnames=("model", "sampling", "chunk"), donate_argnames="slots")
def advance(model, parameters, slots: Slots, prefixes, stopping, *, sampling, chunk: int) -> Slots:
    """Up to `chunk` tokens more in every slot."""

    def step(carry):
        count, replies = carry
        return count + 1, decode(model, parameters, replies, (*prefixes, slots.prompts), sampling, stopping)

    going = lambda carry: (carry[0] < chunk) & ~jnp.all(carry[1].done)  # noqa: E731
    return slots.replace(replies=jax.lax.while_loop(going, step, (0, slots.replies))[1])


def _empty(sampler: Sampler, prompt_length: int) -> Slots:
    """Slots without occupants."""
    config, limit = sampler.config, sampler.max_new_tokens
    # A reply that ends early in a chunk keeps its slot to the chunk's end: room that nothing of it is written over.
    shape = config.slots, prompt_length, limit, limit + config.chunk - 1
    return empty_slots(sampler.model, sampler.parameters, sampler.prefixes, sampler.stopping, shape,
                        sampler.cache_dtype)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "shape", "cache_dtype"))
def empty_slots(model, parameters, prefixes, stopping, shape: tuple[int, int, int, int], cache_dtype: str) -> Slots:
    """Slots without occupants. shape: how many, tokens of a prompt and of a reply, tokens kept of a reply."""
    rows, prompt_length, limit, kept = shape
    token = jnp.zeros((1, 1), jnp.int32)
    like = jax.eval_shape(lambda: prefill(model, parameters, token, token, prefixes, cache_dtype)[1])
    keys = row_keys(jax.random.key(0), jnp.zeros(rows, jnp.int32))
    replies = new_replies(jnp.zeros(rows, jnp.int32), keys, limit, stopping, empty_cache(like, rows, kept))
    return Slots(replies.replace(done=jnp.ones(rows, bool)), empty_cache(like, rows, prompt_length))
