"""Log-probabilities of answers to prompts that share their beginnings, each beginning read once.

The prompts of a group are laid out as a tree of tokens, depth first in one row: what they have in common is its trunk.
Every token sees its own branch alone, so a prompt scores as if it stood by itself.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.models.cache import KVCache
from rlaif_jax.models.parameters import Placement
from rlaif_jax.models.transformer import LanguageModel, unembedding
from rlaif_jax.parallel.mesh import batch_ways, shard_batch
from rlaif_jax.parallel.processes import to_host
from rlaif_jax.sampling.buckets import bucket_of

Tokens = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Tree:
    """Token lists that share beginnings, and which next tokens are asked for."""

    tokens: list[int]
    positions: list[int]  # of each token in its own list
    ends: list[int]  # where the subtree of each token ends
    asked_after: list[int]  # for each question, the index of the token before its answer
    asked_token: list[int]  # for each question, the answer whose log-probability is wanted

    def __len__(self):
        return len(self.tokens)


def grow(prompts: Sequence[Tokens], choices: Sequence[Tokens]) -> Tree:
    """The tree of a group of prompts, each to be answered by each of the choices, none of them empty.

    A choice of several tokens adds all but its last one to the tree. The questions are those of the first prompt's
    first choice, token by token, then of its second choice, and so on.
    """
    questions = [
        ((*prompt, *choice[:i]), choice[i]) for prompt in prompts for choice in choices for i in range(len(choice))
    ]
    paths = sorted({path for path, _ in questions})
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    index: dict[tuple[int, ...], int] = {}

    def lay(paths: list[tuple[int, ...]], depth: int) -> None:
        """Lays out paths, sorted, that agree in their first `depth` tokens."""
        first, last, begin = paths[0], paths[-1], len(tokens)
        shared = next((i for i in range(depth, len(first)) if i >= len(last) or first[i] != last[i]), len(first))
        tokens.extend(first[depth:shared])
        positions.extend(range(depth, shared))
        ends.extend([0] * (shared - depth))
        if len(first) == shared:
            index[first] = len(tokens) - 1
        rest = [path for path in paths if len(path) > shared]
        for token in sorted({path[shared] for path in rest}):
            lay([path for path in rest if path[shared] == token], shared)
        ends[begin : begin + shared - depth] = [len(tokens)] * (shared - depth)

    lay(paths, 0)
    return Tree(tokens, positions, ends, [index[path] for path, _ in questions], [token for _, token in questions])


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A language model ready to score trees."""

    model: LanguageModel
    params: dict
    placement: Placement
    prefix: KVCache | None  # of one row: what stands before every tree
    batch_tokens: int  # tokens laid out at a time, padding included


def score_trees(
    scorer: Scorer, trees: Sequence[Tree], buckets: Sequence[int], asked: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The log-probabilities that each tree's questions ask for; yields (index, [questions] float32) in any order.

    buckets: lengths that trees are padded to, one compiled program each. asked: the most questions of a tree.
    While the caller works on one batch, the device scores the next.
    """
    mesh = scorer.placement.mesh
    devices = batch_ways(mesh)
    prefixes = () if scorer.prefix is None else (scorer.prefix,)
    waiting: tuple[list[int], jax.Array] | None = None
    for length, chosen in _batches([len(tree) for tree in trees], buckets, scorer.batch_tokens, devices):
        rows = rows_of_batch(length, scorer.batch_tokens, devices)
        arrays = shard_batch(_lay_out([trees[i] for i in chosen], rows, length, asked), mesh)
        scores = tree_logprobs(scorer.model, scorer.params, prefixes, *arrays)
        if waiting:
            yield from _fetch(trees, *waiting)
        waiting = chosen, scores
    if waiting:
        yield from _fetch(trees, *waiting)


def _fetch(trees: Sequence[Tree], chosen: list[int], scores: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    for i, row in zip(chosen, to_host(scores), strict=False):  # the last rows may be padding
        yield i, row[: len(trees[i].asked_token)]


def rows_of_batch(length: int, batch_tokens: int, devices: int) -> int:
    """How many rows of a length make a batch: a multiple of the devices, at least one on each."""
    return max(batch_tokens // (length * devices), 1) * devices


def _batches(
    lengths: Sequence[int], buckets: Sequence[int], batch_tokens: int, devices: int
) -> Iterator[tuple[int, list[int]]]:
    """(padded length, indices of the rows) of each batch. What does not fill a batch joins the next longer rows."""
    members: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        members.setdefault(bucket_of(lengths[i], buckets), []).append(i)
    left: list[int] = []
    for bucket in sorted(members):
        rows, left = rows_of_batch(bucket, batch_tokens, devices), left + members[bucket]
        while len(left) >= rows or (left and bucket == max(members)):
            yield bucket, left[:rows]
            left = left[rows:]


def _lay_out(trees: Sequence[Tree], rows: int, length: int, asked: int) -> tuple[np.ndarray, ...]:
    """Trees as arrays: tokens, positions, ends [rows, length] and the questions [rows, asked], all int32."""
    columns = [np.zeros((rows, length), np.int32) for _ in range(3)]
    questions = [np.zeros((rows, asked), np.int32) for _ in range(2)]
    for row, tree in enumerate(trees):
        for array, values in zip(columns, (tree.tokens, tree.positions, tree.ends), strict=True):
            array[row, : len(tree)] = values
        for array, values in zip(questions, (tree.asked_after, tree.asked_token), strict=True):
            array[row, : len(values)] = values
    return *columns, *questions


@functools.partial(jax.jit, static_argnames="model")
def tree_logprobs(model, params, prefixes, tokens, positions, ends, asked_after, asked_token) -> jax.Array:
    """[rows, length] trees and [rows, asked] questions. Returns the answers' log-probs, [rows, asked] float32."""
    before = sum(prefix.slots for prefix in prefixes)
    hidden, _ = model.apply(
        {"params": params}, tokens, (ends > 0).astype(jnp.int32), before + positions, ends=ends, prefixes=prefixes
    )
    return answer_logprobs(hidden, unembedding(params), asked_after, asked_token)


def answer_logprobs(hidden, unembedding, asked_after, asked_token) -> jax.Array:
    """Log-prob of token asked_token[r, q] after the token at asked_after[r, q]: [rows, asked] float32."""
    states = jnp.take_along_axis(hidden, asked_after[..., None], axis=1)
    logits = jnp.matmul(states, unembedding.astype(states.dtype), preferred_element_type=jnp.float32)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logprobs, asked_token[..., None], axis=-1)[..., 0]


def sum_by_choice(logprobs: np.ndarray, prompts: int, choices: Sequence[Tokens]) -> np.ndarray:
    """The log-probability of each whole choice from those of its tokens, as `grow` asks: [prompts, choices]."""
    starts = np.cumsum([0, *(len(choice) for choice in choices)])[:-1]
    return np.add.reduceat(logprobs.reshape(prompts, -1).astype(np.float64), starts, axis=1)
