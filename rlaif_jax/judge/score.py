"""The local judge: log-probabilities of the two answers, in both orders, nothing that prompts share read twice."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data import tokenizers
from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import Template, load_template, text_hash
from rlaif_jax.judge.rationale import RationaleConfig, Reasoner, make_reasoner, reason
from rlaif_jax.models import gguf
from rlaif_jax.models.cache import KVCache
from rlaif_jax.models.parameters import Placement, decoding_model, decoding_parameters, place_parameters
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.sampling.buckets import length_buckets
from rlaif_jax.sampling.trees import Scorer, Tree, grow, score_trees, sum_by_choice

_PLANNED = 1024  # trees of a job whose lengths decide what lengths are compiled
_BEGINNINGS = ("a", "A", "1", " ", "\n", "\n\n", "\t", ".", "'s", "é", "中")  # of texts, each split in its own way


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Which model judges, with which prompt, and how."""

    weights: str  # a GGUF file; package:NAME for the one inside an installed package
    template: str  # a name in rlaif_jax/judge/templates, or the path of a YAML file
    chain_of_thought: bool  # the judge explains itself before it chooses
    batch_tokens: int  # tokens scored at a time, padding included
    buckets: int  # different lengths that prompts are padded to, one compiled program each
    bucket_multiple: int  # what all these lengths are multiples of
    pairs_per_tree: int  # consecutive pairs of one prompt that read it together
    max_length: int  # tokens of a whole prompt, preamble, rationale and answer included
    dtype: str  # of the computation
    attention: str  # a name in rlaif_jax/models/attention.py: "auto", "plain", "cudnn" or "splash"
    shuffle_weights: bool  # negative control: permutes the entries of every matrix
    shard_size: int  # pairs in one committed shard of labels
    max_failure_rate: float  # a larger share of unscored pairs stops the stage
    rationale: RationaleConfig  # how rationales are written in a chain of thought


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
    rationale_forward: str | None  # of a judge that explains itself
    rationale_reversed: str | None
    tokens_forward: int  # of the whole prompt
    tokens_reversed: int
    hash_forward: str  # of the whole prompt's text
    hash_reversed: str


@dataclasses.dataclass(frozen=True)
class Judge:
    """A loaded judge."""

    config: JudgeConfig
    template: Template
    tokenizer: PreTrainedTokenizerFast
    scorer: Scorer  # its prefix holds the keys and values of `preamble`
    preamble: tuple[int, ...]  # the tokens that all prompts begin with
    choices: tuple[tuple[int, ...], ...]
    weights_hash: str
    reasoner: Reasoner | None  # where the template asks for a rationale

    @property
    def provenance(self) -> dict[str, str]:
        """What tells this judge's labels from another's: weights, template and the hashes of both."""
        return {
            "judge": self.config.weights + (" (shuffled)" if self.config.shuffle_weights else ""),
            "judge_hash": self.weights_hash,
            "template": self.template.name,
            "template_hash": self.template.digest,
        }

    def prompts(self, pair: Pair) -> tuple[str, str]:
        """The whole prompts of a pair, with response a and with response b in slot 1."""
        suffix, preamble = self.template.suffix, self.template.preamble
        forward = preamble + suffix(pair.prompt, pair.response_a, pair.response_b)
        return forward, preamble + suffix(pair.prompt, pair.response_b, pair.response_a)


class Plan(NamedTuple):
    """The shapes that a labelling job compiles."""

    buckets: list[int]  # lengths that trees are padded to
    asked: int  # the most questions of a tree


def load_judge(config: JudgeConfig, seed: int, placement: Placement) -> Judge:
    """Loads the weights and the template, and reads the preamble.

    Raises UserError where the choices can't be told apart, and where the preamble leaves no room for a pair.
    """
    template = load_template(config.template, config.chain_of_thought)
    reader = gguf.open_gguf(config.weights)
    tokenizer = tokenizers.from_gguf(reader)
    choices = tuple(tuple(tokens) for tokens in _tokens(tokenizer, template.choices))
    if choices[0] == choices[1]:
        raise UserError(f"judge template {template.name}: the tokenizer reads both choices as the same tokens")
    preamble = _shared_tokens(tokenizer, template)
    if len(preamble) >= config.max_length:
        raise UserError(
            f"the preamble of judge template {template.name} has {len(preamble)} tokens, which leaves no room for "
            f"a pair in judge.max_length={config.max_length}"
        )
    shape = dataclasses.replace(gguf.model_config(reader), dtype=config.dtype, attention=config.attention)
    stacked = LanguageModel(shape)
    weights = gguf.load_parameters(reader, shuffle_seed=seed if config.shuffle_weights else None)
    # Layers of their own are 1.2 times as fast as stacked ones, of which each call cuts copies (measured on a CPU).
    params = decoding_parameters(stacked, place_parameters(stacked, weights, placement), placement)
    model = decoding_model(stacked)
    prefix = read_prefix(model, params, jnp.asarray([preamble], jnp.int32)) if preamble else None
    scorer = Scorer(model, params, placement, prefix, config.batch_tokens)
    reasoner = None
    if template.reasoning:
        reasoner = make_reasoner(config.rationale, template.reasoning, tokenizer, scorer, choices, seed)
    return Judge(config, template, tokenizer, scorer, preamble, choices, gguf.weights_hash(config.weights), reasoner)


def plan_judging(judge: Judge, pairs: Sequence[Pair]) -> Plan:
    """The shapes for a job, from the lengths of about `_PLANNED` of its trees, spread evenly over it."""
    groups = _groups(pairs, judge.config.pairs_per_tree)
    some = groups[:: math.ceil(len(groups) / _PLANNED)] if groups else []
    lengths = [len(_tree(judge, suffix_tokens(judge, [pairs[i] for i in group]))) for group in some]
    buckets = length_buckets(lengths, judge.config.buckets, judge.config.bucket_multiple) if lengths else []
    return Plan(buckets, 2 * max(map(len, groups), default=0) * sum(map(len, judge.choices)))


def judge_pairs(
    judge: Judge, pairs: Sequence[Pair], plan: Plan, first_pair: int, on_prompts: Callable[[int], object]
) -> list[Judgement]:
    """Judges each pair in both orders and averages (Lee et al., arXiv 2309.00267, section 2.1.1).

    plan: of the job that the pairs are part of. first_pair: the number of the first one in the job, on which
    rationales depend. `on_prompts` is told of prompts that are scored, and how many.
    """
    answers = answer_pairs(judge, pairs, plan, first_pair, on_prompts)
    return [_judgement(judge, pair, i, answers) for i, pair in enumerate(pairs)]


class Answers(NamedTuple):
    """What a judge answered to both prompts of each pair: with response a and with response b in slot 1."""

    logprobs: np.ndarray  # [pairs, order, slot] float64, of the choices; NaN where a prompt is not scored
    lengths: np.ndarray  # [pairs, order] tokens of the whole prompts
    fits: np.ndarray  # [pairs] bool: both prompts, and what is to follow them, are within the judge's length
    rationales: dict[tuple[int, int], str]  # (pair, order) -> rationale


def answer_pairs(
    judge: Judge, pairs: Sequence[Pair], plan: Plan, first_pair: int, on_prompts: Callable[[int], object]
) -> Answers:
    """The log-probabilities of both choices in both orders; the arguments are those of `judge_pairs`."""
    rests = suffix_tokens(judge, pairs)
    after = judge.reasoner.tokens_after if judge.reasoner else max(map(len, judge.choices)) - 1
    lengths = np.array([len(judge.preamble) + len(rest) for rest in rests]).reshape(-1, 2)
    fits = np.all(lengths + after <= judge.config.max_length, axis=1)
    answers = Answers(np.full((len(pairs), 2, 2), np.nan), lengths, fits, {})
    wanted = [i for i, pair in enumerate(pairs) if fits[i] and pair.response_a != pair.response_b]
    if judge.reasoner:
        rows = [(i, order) for i in wanted for order in (0, 1)]
        row_ids = [2 * (first_pair + i) + order for i, order in rows]
        prompts = [rests[2 * i + order] for i, order in rows]
        for row, (text, scores) in reason(judge.reasoner, prompts, row_ids):
            answers.logprobs[rows[row]], answers.rationales[rows[row]] = scores, text
            on_prompts(1)
    else:
        for chosen, scores in _score(judge, pairs, wanted, rests, plan):
            answers.logprobs[chosen] = scores
            on_prompts(2 * len(chosen))
    return answers


def _judgement(judge: Judge, pair: Pair, i: int, answers: Answers) -> Judgement:
    forward, backward = (_log_odds(row) for row in answers.logprobs[i])
    status = _status(pair, bool(answers.fits[i]), forward, backward)
    prob_a = prob_forward = prob_reversed = None
    if status == "ok":
        prob_forward, prob_reversed = _sigmoid(forward), _sigmoid(-backward)
        prob_a = (prob_forward + prob_reversed) / 2
    rationales = (answers.rationales.get((i, order)) for order in (0, 1))
    hashes = map(text_hash, judge.prompts(pair))
    return Judgement(status, prob_a, prob_forward, prob_reversed, *rationales, *answers.lengths[i].tolist(), *hashes)


def _score(
    judge: Judge, pairs: Sequence[Pair], wanted: list[int], rests: list[list[int]], plan: Plan
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Log-probs of the two choices in both orders: yields (pairs, [pairs, order, slot] float64) tree by tree."""
    groups = _groups([pairs[i] for i in wanted], judge.config.pairs_per_tree)
    members = [[wanted[i] for i in group] for group in groups]
    trees = [_tree(judge, [rest for i in group for rest in rests[2 * i : 2 * i + 2]]) for group in members]
    for index, logprobs in score_trees(judge.scorer, trees, plan.buckets, plan.asked):
        chosen = members[index]
        yield chosen, sum_by_choice(logprobs, 2 * len(chosen), judge.choices).reshape(-1, 2, 2)


def _groups(pairs: Sequence[Pair], limit: int) -> list[list[int]]:
    """Numbers of consecutive pairs that compare responses to one prompt, at most `limit` of them together."""
    groups = []
    for _, same in itertools.groupby(range(len(pairs)), key=lambda i: pairs[i].prompt):
        numbers = list(same)
        groups += [numbers[start : start + limit] for start in range(0, len(numbers), limit)]
    return groups


def _tree(judge: Judge, rests: Sequence[Sequence[int]]) -> Tree:
    return grow(rests, judge.choices)


def suffix_tokens(judge: Judge, pairs: Sequence[Pair]) -> list[list[int]]:
    """What follows the preamble's tokens in both prompts of each pair: two token lists a pair."""
    texts = [text for pair in pairs for text in judge.prompts(pair)]
    count, rests = len(judge.preamble), []
    for text, tokens in zip(texts, _tokens(judge.tokenizer, texts), strict=True):
        if tuple(tokens[:count]) != judge.preamble:  # a tokenizer that looks far ahead: the same text, split here
            shared = judge.tokenizer.decode(judge.preamble)
            tokens = [*judge.preamble, *_tokens(judge.tokenizer, [text.removeprefix(shared)])[0]]
        rests.append(tokens[count:])
    return rests


def _shared_tokens(tokenizer: PreTrainedTokenizerFast, template: Template) -> tuple[int, ...]:
    """The tokens that all prompts of a template begin with, whatever their texts begin with."""
    texts = [template.preamble + template.suffix(begin, begin, begin) for begin in _BEGINNINGS]
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*_tokens(tokenizer, texts), strict=False))
    return tuple(tokens[0] for tokens in alike)


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


@functools.partial(jax.jit, static_argnames="model")
def read_prefix(model: LanguageModel, params, tokens: jax.Array) -> KVCache:
    """The cache of one row, all of it real tokens."""
    _, cache = model.apply({"params": params}, tokens, jnp.ones_like(tokens), keep_keys=True)
    return cache.replace(mask=None)


def _tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
