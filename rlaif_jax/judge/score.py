"""The local judge: log-probabilities of the two answers, in both orders, the shared preamble prefilled once."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data import tokenizers
from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import Template, load_template, text_hash
from rlaif_jax.models import gguf
from rlaif_jax.models.parameters import Placement, place_parameters
from rlaif_jax.models.transformer import KVCache, LanguageModel, empty_cache, unembedding
from rlaif_jax.parallel.mesh import shard_batch


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Which model judges, with which prompt, and how."""

    weights: str  # a GGUF file; package:NAME for the one inside an installed package
    template: str  # a name in rlaif_jax/judge/templates, or the path of a YAML file
    batch_size: int  # prompts scored at a time
    bucket: int  # prompts are padded to a multiple of this many tokens
    max_length: int  # tokens of a whole prompt, preamble included
    dtype: str  # of the computation
    shuffle_weights: bool  # negative control: permutes the entries of every matrix
    shard_size: int  # pairs in one committed shard of labels
    max_failure_rate: float  # a larger share of unscored pairs stops the stage


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one prompt."""

    prompt: str
    response_a: str
    response_b: str


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the judge said of a pair. Probabilities are of response a; None where `status` is not ok."""

    status: str  # "ok", "too_long", "identical" or "not_finite"
    prob_a: float | None
    prob_a_forward: float | None  # a in slot 1
    prob_a_reversed: float | None  # a in slot 2
    tokens_forward: int  # of the whole prompt
    tokens_reversed: int
    hash_forward: str  # of the whole prompt's text
    hash_reversed: str


@dataclasses.dataclass(frozen=True)
class Judge:
    """A loaded judge. `prefix` holds the keys and values of the template's preamble."""

    config: JudgeConfig
    template: Template
    tokenizer: PreTrainedTokenizerFast
    model: LanguageModel
    params: dict
    prefix: KVCache
    answers: tuple[int, int]
    placement: Placement
    weights_hash: str

    @property
    def provenance(self) -> dict[str, str]:
        """What tells this judge's labels from another's: weights, template and the hashes of both."""
        return {
            "judge": self.config.weights + (" (shuffled)" if self.config.shuffle_weights else ""),
            "judge_hash": self.weights_hash,
            "template": self.template.name,
            "template_hash": self.template.digest,
        }


def load_judge(config: JudgeConfig, seed: int, placement: Placement) -> Judge:
    """Loads the weights and the template, and prefills the preamble.

    Raises UserError where an answer is not one token, or where the preamble leaves no room for a pair.
    """
    template = load_template(config.template)
    reader = gguf.open_gguf(config.weights)
    tokenizer = tokenizers.from_gguf(reader)
    answers = tuple(_single_token(tokenizer, choice) for choice in template.choices)
    if answers[0] == answers[1]:
        raise UserError(f"judge template {template.name}: both choices are the same token")
    preamble = _tokens(tokenizer, template.preamble)
    if len(preamble) >= config.max_length:
        raise UserError(
            f"the preamble of judge template {template.name} has {len(preamble)} tokens, which leaves no room for "
            f"a pair in judge.max_length={config.max_length}"
        )
    model = LanguageModel(dataclasses.replace(gguf.model_config(reader), dtype=config.dtype))
    weights = gguf.load_parameters(reader, shuffle_seed=seed if config.shuffle_weights else None)
    params = place_parameters(model, weights, placement)
    prefix = _prefill(model, params, jnp.asarray([preamble], jnp.int32))
    return Judge(
        config, template, tokenizer, model, params, prefix, answers, placement, gguf.weights_hash(config.weights)
    )


def judge_pairs(judge: Judge, pairs: Sequence[Pair], on_prompts: Callable[[int], object]) -> list[Judgement]:
    """Judges each pair in both orders and averages (Lee et al., arXiv 2309.00267, section 2.1.1).

    `on_prompts` is told how many prompts each batch scored.
    """
    suffixes = []
    for pair in pairs:
        suffixes.append(judge.template.suffix(pair.prompt, pair.response_a, pair.response_b))
        suffixes.append(judge.template.suffix(pair.prompt, pair.response_b, pair.response_a))
    tokens = [_tokens(judge.tokenizer, suffix) for suffix in suffixes]
    preamble = judge.prefix.key.shape[2]
    fits = [preamble + len(row) <= judge.config.max_length for row in tokens]
    scored = [i for i, fit in enumerate(fits) if fit]
    logprobs = np.full((len(suffixes), 2), np.nan)
    if scored:
        logprobs[scored] = _score(judge, [tokens[i] for i in scored], on_prompts)
    judgements = []
    for i, pair in enumerate(pairs):
        orders = slice(2 * i, 2 * i + 2)
        forward, backward = (_log_odds(row) for row in logprobs[orders])
        status = _status(pair, all(fits[orders]), forward, backward)
        prob_a = prob_forward = prob_reversed = None
        if status == "ok":
            prob_forward, prob_reversed = _sigmoid(forward), _sigmoid(-backward)
            prob_a = (prob_forward + prob_reversed) / 2
        lengths = [preamble + len(row) for row in tokens[orders]]
        hashes = [text_hash(judge.template.preamble + suffix) for suffix in suffixes[orders]]
        judgements.append(Judgement(status, prob_a, prob_forward, prob_reversed, *lengths, *hashes))
    return judgements


def _status(pair: Pair, fits: bool, forward: float, backward: float) -> str:
    if not fits:
        return "too_long"
    if pair.response_a == pair.response_b:
        return "identical"
    return "ok" if math.isfinite(forward) and math.isfinite(backward) else "not_finite"


def _log_odds(logprobs: np.ndarray) -> float:
    """Of slot 1 over slot 2: the softmax over the two answers alone (arXiv 2309.00267, section 2.1)."""
    return float(logprobs[0] - logprobs[1])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _score(judge: Judge, rows: list[list[int]], on_prompts: Callable[[int], object]) -> np.ndarray:
    """Log-probs of the two answers after preamble + row, [rows, 2] float64. Rows of like length share a batch."""
    size, bucket = judge.config.batch_size, judge.config.bucket
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = np.empty((len(rows), 2))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        length = math.ceil(len(rows[chosen[-1]]) / bucket) * bucket
        tokens, lengths = np.zeros((size, length), np.int32), np.ones(size, np.int32)
        for i, row in enumerate(chosen):
            tokens[i, : len(rows[row])], lengths[i] = rows[row], len(rows[row])
        batch = shard_batch((tokens, lengths), judge.placement.mesh)
        scores = _answer_logprobs(judge.model, judge.params, judge.prefix, *batch, judge.answers)
        out[chosen] = np.asarray(scores)[: len(chosen)]
        on_prompts(len(chosen))
    return out


@functools.partial(jax.jit, static_argnames="model")
def _prefill(model: LanguageModel, params, tokens: jax.Array) -> KVCache:
    cache = empty_cache(model.config, 1, tokens.shape[1])
    return model.apply({"params": params}, tokens, jnp.ones_like(tokens), cache=cache)[1]


@functools.partial(jax.jit, static_argnames=("model", "answers"))
def _answer_logprobs(model, params, prefix: KVCache, tokens, lengths, answers: tuple[int, int]) -> jax.Array:
    """tokens: [batch, length] int32 padded on the right; lengths: [batch] int32. Returns [batch, 2] float32."""
    segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    hidden, _ = model.apply({"params": params}, tokens, segment_ids, prefix=prefix)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = (last @ unembedding(params).astype(last.dtype)).astype(jnp.float32)
    return jax.nn.log_softmax(logits, axis=-1)[:, jnp.asarray(answers)]


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _single_token(tokenizer: PreTrainedTokenizerFast, choice: str) -> int:
    tokens = _tokens(tokenizer, choice)
    if len(tokens) != 1:
        raise UserError(f"the judge's tokenizer splits the choice {choice!r} into {len(tokens)} tokens; one is needed")
    return tokens[0]
