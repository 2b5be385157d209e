"""Replies of a trained policy, each written down soon after it is whole, so that a kill loses few of them."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
from etils import epath
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data.encoding import decode_responses, encode_prompts
from rlaif_jax.errors import Stopped, UserError
from rlaif_jax.files import read_shards, shard_names, write_checked_parquet
from rlaif_jax.models.parameters import Placement, abstract_parameters, decoding_model, decoding_parameters
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.models.weights import load_parameters, open_weights
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.mesh import shard_batch
from rlaif_jax.progress import progress
from rlaif_jax.sampling.continuous import Sampler, sample
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.stopping import make_stopping
from rlaif_jax.stages.run import Run
from rlaif_jax.training.sequences import Sequences

Encoded = tuple[np.ndarray, np.ndarray]  # what `encode_prompts` returns


class Replies(NamedTuple):
    """What a policy replied, one entry a row."""

    texts: list[str]
    ended: list[bool]  # by an end of sequence; the others reached the limit
    sequences: Sequences  # of host arrays


def sample_replies(
    run: Run, params, prompts: Sequence[str], copies: int, key: jax.Array, sampling: SamplingConfig
) -> Replies:
    """`copies` replies to each prompt, one after another; row i's randomness is `key` and i."""
    encoded, tokenizer = encode_prompts(run.tokenizer(), prompts, run.config.policy.max_prompt_length), run.tokenizer()
    rows = dict(_sample(_policy_sampler(run, params, sampling), tokenizer, _unpadded(encoded), copies, key))
    return _replies(run, encoded, copies, rows)


def keep_replies(
    run: Run,
    params,
    prompts: Sequence[str],
    copies: int,
    key: jax.Array,
    sampling: SamplingConfig,
    folder: epath.Path,
    commit_every: int,
) -> Replies:
    """As `sample_replies`, kept in `folder` as `keep_rows` does."""
    encoded, tokenizer = encode_prompts(run.tokenizer(), prompts, run.config.policy.max_prompt_length), run.tokenizer()
    sampler = _policy_sampler(run, params, sampling)
    return _replies(
        run, encoded, copies, keep_rows(sampler, tokenizer, _unpadded(encoded), copies, key, folder, commit_every)
    )


def keep_rows(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    copies: int,
    key: jax.Array,
    folder: epath.Path,
    commit_every: int,
    skipped: Collection[int] = (),
    about: Sequence[Mapping[str, str]] = (),
) -> dict[int, dict]:
    """Samples replies into shards in `folder`, `commit_every` replies a shard; those there are not sampled.

    skipped: prompts that get no reply. about: what is kept with the replies to each prompt, by the names of columns.
    Returns row -> tokens, text, ended. Raises UserError where a shard is damaged, or of other prompts.
    """
    names = processes.agree(lambda: shard_names(folder))
    rows, fresh, shards = _committed(folder, names), [], len(names)
    for row, kept in rows.items():
        if about and any(kept[name] != value for name, value in about[row // copies].items()):
            raise UserError(f"{folder} holds texts that other prompts have led to: delete it, and they are made again")
    done = frozenset(i for i in range(len(prompts)) if all(copies * i + copy in rows for copy in range(copies)))
    total, schema = copies * (len(prompts) - len(skipped)), _SCHEMA
    for name in about[0] if about else ():
        schema = schema.append(pa.field(name, pa.string()))
    with progress(None, folder.name, total=total, initial=copies * len(done), unit="reply") as bar:
        for row, reply in _sample(sampler, tokenizer, prompts, copies, key, done.union(skipped)):
            rows[row] = reply
            fresh.append({"row": row} | reply | (about[row // copies] if about else {}))
            bar.update()
            stop = processes.stop_point()
            if len(fresh) == commit_every or len(rows) == total or stop:
                table = pa.Table.from_pylist(fresh, schema=schema)
                processes.by_first(lambda: write_checked_parquet(folder, f"{shards:05d}", table))  # noqa: B023  (at once)
                fresh, shards = [], shards + 1
            if stop:
                raise Stopped
    return rows


_SCHEMA = pa.schema(
    [("row", pa.int32()), ("tokens", pa.list_(pa.int32())), ("text", pa.string()), ("ended", pa.bool_())]
)


def _committed(folder: epath.Path, names: Sequence[str]) -> dict[int, dict]:
    """The replies in these shards of `folder`, by row."""
    shards = read_shards(folder, "its replies alone are sampled again", names)
    return {row.pop("row"): row for _, table in shards for row in table.to_pylist()}


def _sample(
    sampler: Sampler, tokenizer, prompts: Sequence[Sequence[int]], copies: int, key: jax.Array, done=frozenset()
) -> Iterator[tuple[int, dict]]:
    """Yields (row, reply: tokens, text, ended) as they finish, but for the prompts in `done`."""
    for row, reply in sample(sampler, prompts, key, range(copies * len(prompts)), done):
        (text,) = decode_responses(tokenizer, reply.tokens[None], np.ones((1, len(reply.tokens)), bool))
        yield row, {"tokens": reply.tokens.tolist(), "text": text, "ended": reply.ended}


def loaded_decoder(run: Run, path: str, dtype: str) -> tuple[LanguageModel, dict]:
    """A model on disk, computing in `dtype`, and its parameters as sampling takes them."""
    weights = open_weights(path)
    model = LanguageModel(dataclasses.replace(weights.config, dtype=dtype))
    with jax.set_mesh(run.placement.mesh):
        placed = load_parameters(weights, abstract_parameters(model, run.placement), dtype)
        return decoding_model(model), decoding_parameters(model, placed, run.placement)


def _policy_sampler(run: Run, params, sampling: SamplingConfig) -> Sampler:
    model, limit = run.language_model(), run.config.policy.max_response_length
    parameters, stopping = decoding_parameters(model, params, run.placement), make_stopping(run.tokenizer())
    return Sampler(decoding_model(model), parameters, run.placement, stopping, sampling, limit, run.config.sampler)


def _unpadded(encoded: Encoded) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(*encoded, strict=True)]


def _replies(run: Run, encoded: Encoded, copies: int, rows: dict[int, dict]) -> Replies:
    ordered, limit = [rows[row] for row in range(copies * len(encoded[0]))], run.config.policy.max_response_length
    tokens, mask = np.zeros((len(ordered), limit), np.int32), np.zeros((len(ordered), limit), bool)
    for row, reply in enumerate(ordered):
        length = len(reply["tokens"])
        tokens[row, :length], mask[row, :length] = reply["tokens"], True
    prompt_array, prompt_mask = (np.repeat(x, copies, axis=0) for x in encoded)
    texts, ended = ([reply[name] for reply in ordered] for name in ("text", "ended"))
    return Replies(texts, ended, Sequences(prompt_array, prompt_mask, tokens, mask))


def padded_batches(sequences: Sequences, batch_size: int, placement: Placement) -> Iterator[tuple[int, Sequences]]:
    """Host arrays in device batches of one size, the last filled up with its first row. Yields (rows, batch)."""
    total = len(sequences.prompts)
    for start in range(0, total, batch_size):
        rows = np.arange(start, start + batch_size)
        source = np.where(rows < total, rows, start)
        batch = jax.tree.map(lambda x, source=source: np.asarray(x)[source], sequences)
        yield min(batch_size, total - start), shard_batch(batch, placement.mesh)
