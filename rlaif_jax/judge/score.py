"""The local judge: log-probabilities of its answers to a pair's prompts, nothing that prompts share read twice."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data import tokenizers
from rlaif_jax.data.encoding import texts_to_tokens, tokens_to_text
from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import (
    PLAIN,
    Pair,
    Prompt,
    PromptConfig,
    Template,
    chat_frame,
    encode,
    load_template,
    text_hash,
)
from rlaif_jax.judge.rationale import RationaleConfig, Reasoner, make_reasoner, reason
from rlaif_jax.judge.verdict import Verdict, exclusive, normalise, rating, verdict
from rlaif_jax.models.cache import KVCache
from rlaif_jax.models.parameters import (
    Placement,
    abstract_parameters,
    decoding_model,
    decoding_parameters,
    to_device,
)
from rlaif_jax.models.transformer import LanguageModel, ModelConfig
from rlaif_jax.models.weights import load_parameters, open_weights, weights_hash
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.mesh import JUDGE_RULES
from rlaif_jax.sampling.buckets import length_buckets
from rlaif_jax.sampling.trees import Scorer, grow, score_trees, sum_by_choice

POLICY = "policy"  # as the weights of a judge that labels: the policy itself, as it is when it makes the pairs
_PLANNED = 1024  # trees of a job whose lengths decide what lengths are compiled
_BEGINNINGS = ("a", "A", "1", " ", "\n", "\n\n", "\t", ".", "'s", "é", "中")  # of texts, each split in its own way


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Which model judges, with which prompt, and how."""

    weights: str  # a GGUF file, a Hugging Face folder or package:NAME; in a panel also "policy", its own judge
    prompt: PromptConfig
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
    cache: str  # a folder of labels that runs share, so that no pair is judged twice by one judge; "" for none
    rationale: RationaleConfig  # how rationales are written in a chain of thought


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the judge said of a pair. "forward" is response a in slot 1, or by itself where each is rated."""

    status: str  # "ok", "too_long", "identical" or "not_finite"
    verdict: Verdict | None  # None where `status` is not ok
    rationale_forward: list[str] | None  # of a judge that explains itself
    rationale_reversed: list[str] | None
    tokens_forward: int  # of the longest prompt
    tokens_reversed: int
    hash_forward: str  # of the prompts' text
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
    name: str
    weights_hash: str
    seed: int  # of rationales
    reasoner: Reasoner | None  # where the template asks for a rationale

    @property
    def provenance(self) -> dict[str, str]:
        """What tells this judge's labels from another's: weights, template and the hashes of both."""
        return {
            "judge": self.name,
            "judge_hash": self.weights_hash,
            "template": self.template.name,
            "template_hash": self.template.digest,
        }

    @property
    def everywhere(self) -> bool:
        """Whether its programs are on devices of several processes, which then judge all together."""
        return self.scorer.placement.mesh.is_multi_process

    def on_its_mesh(self):
        """The context of the judge's programs: its mesh is not that of the stage which asks it."""
        return jax.set_mesh(self.scorer.placement.mesh)

    def moved(self, move: Callable[[dict], dict]) -> "Judge":
        """The judge with its parameters where `move` puts them. It judges with copies on its devices."""
        scorer, reasoner = dataclasses.replace(self.scorer, params=move(self.scorer.params)), self.reasoner
        if reasoner:
            sampler = dataclasses.replace(reasoner.sampler, parameters=scorer.params)
            reasoner = dataclasses.replace(reasoner, sampler=sampler)
        return dataclasses.replace(self, scorer=scorer, reasoner=reasoner)

    @property
    def samples(self) -> int:
        """Rationales a prompt."""
        return self.reasoner.samples if self.reasoner else 1


class JudgeModel(NamedTuple):
    """A model that judges."""

    name: str  # what its labels say of it, with the hash
    weights_hash: str
    shape: ModelConfig
    params: dict  # placed
    tokenizer: PreTrainedTokenizerFast


class Plan(NamedTuple):
    """The shapes that a labelling job compiles."""

    buckets: list[int]  # lengths that trees are padded to
    asked: int  # the most questions of a tree


def load_judge(config: JudgeConfig, seed: int, placement: Placement) -> Judge:
    """The judge of `config.weights`. Raises UserError as `make_judge` does, and for weights that can't be read."""
    weights, tokenizer = open_weights(config.weights), tokenizers.from_weights(config.weights)
    abstract = abstract_parameters(LanguageModel(weights.config), placement)
    params = load_parameters(weights, abstract, config.dtype, seed if config.shuffle_weights else None)
    name = config.weights + (" (shuffled)" if config.shuffle_weights else "")
    model = JudgeModel(name, weights_hash(config.weights), weights.config, params, tokenizer)
    return make_judge(config, model, seed, placement)


def make_judge(config: JudgeConfig, judge_model: JudgeModel, seed: int, placement: Placement) -> Judge:
    """A model with the template that it judges by, the preamble read. Its parameters lie on the mesh of judges.

    Raises UserError where the choices can't be told apart, and where the preamble leaves no room for a pair.
    """
    tokenizer = judge_model.tokenizer
    frame = chat_frame(tokenizer) if config.prompt.chat else PLAIN
    template = dataclasses.replace(load_template(config.prompt), frame=frame)
    choices = tuple(tuple(tokens) for tokens in texts_to_tokens(tokenizer, template.choices, continuing=True))
    if len(set(choices)) < len(choices):
        raise UserError(f"judge template {template.name}: the tokenizer reads two choices as the same tokens")
    preamble = _shared_tokens(tokenizer, template)
    stacked = LanguageModel(dataclasses.replace(judge_model.shape, dtype=config.dtype, attention=config.attention))
    # Layers of their own are 1.2 times as fast as stacked ones, of which each call cuts copies (measured on a CPU).
    model = decoding_model(stacked)
    with jax.set_mesh(placement.mesh):
        params = decoding_parameters(stacked, judge_model.params, placement, JUDGE_RULES)
        prefix = read_prefix(model, params, np.array([preamble], np.int32)) if preamble else None
    jax.block_until_ready((params, prefix))  # a process that ends in the middle of it, with nothing to judge, crashes
    scorer = Scorer(model, params, placement, prefix, config.batch_tokens)
    reasoner = None
    if template.reasoning:
        reasoner = make_reasoner(config.rationale, template, tokenizer, scorer, choices, seed)
    after = _tokens_after(reasoner, choices)
    if len(preamble) + after >= config.max_length:
        raise UserError(
            f"the preamble of judge template {template.name} has {len(preamble)} tokens and what follows a pair up to "
            f"{after} (judge.rationale.max_new_tokens), which leaves no room for a pair in "
            f"judge.max_length={config.max_length}"
        )
    name, weights_hash = judge_model.name, judge_model.weights_hash
    return Judge(config, template, tokenizer, scorer, preamble, choices, name, weights_hash, seed, reasoner)


def plan_judging(judge: Judge, pairs: Sequence[Pair]) -> Plan:
    """The shapes for a job, from the lengths of about `_PLANNED` of its trees, spread evenly over it."""
    groups = _groups(pairs, judge.config.pairs_per_tree)
    some = groups[:: math.ceil(len(groups) / _PLANNED)] if groups else []
    rests = ([rest for i in group for rest in suffix_tokens(judge, pairs[i])] for group in some)
    lengths = [len(grow(prompts, judge.choices)) for prompts in rests]
    buckets = length_buckets(lengths, judge.config.buckets, judge.config.bucket_multiple) if lengths else []
    questions = 2 * max(map(len, groups), default=0) * len(judge.template.questions)
    return Plan(buckets, questions * sum(map(len, judge.choices)))


def live_plan(judge: Judge) -> Plan:
    """Shapes that do not depend on a job, for pairs that come a few at a time, as those of a policy in training."""
    questions = 2 * judge.config.pairs_per_tree * len(judge.template.questions)
    return Plan(_ladder(judge.config), questions * sum(map(len, judge.choices)))


def judge_pairs(
    judge: Judge,
    pairs: Sequence[Pair],
    plan: Plan | None = None,
    ids: Sequence[int] | None = None,
    on_prompts: Callable[[float], object] = lambda prompts: None,
) -> list[Judgement]:
    """Judges each pair in both orders and averages, or rates both responses (`judge.verdict`).

    plan: of the job that the pairs are part of. ids: the number of each in the job, on which its rationales depend.
    Without them the pairs are the job. `on_prompts` is told of prompts that are scored, and how many.
    """
    if not pairs:
        return []
    plan = plan or plan_judging(judge, pairs)
    answers = answer_pairs(judge, pairs, plan, range(len(pairs)) if ids is None else ids, on_prompts)
    return [_judgement(judge, pair, i, answers) for i, pair in enumerate(pairs)]


def judge_live(judge: Judge, pairs: Sequence[Pair], plan: Plan, ids: Sequence[int]) -> list[Judgement]:
    """As `judge_pairs`; of several processes each judges a part, and all get the whole."""
    if judge.everywhere:
        return judge_pairs(judge, pairs, plan, ids)

    def judged(pairs: Sequence[Pair], ids: Sequence[int]) -> list[dict]:
        return list(map(dataclasses.asdict, judge_pairs(judge, pairs, plan, ids)))

    rows = processes.parted(pairs, judged, ids)
    return [Judgement(**row | {"verdict": row["verdict"] and Verdict(*row["verdict"])}) for row in rows]


def _tokens_after(reasoner: Reasoner | None, choices: Sequence[tuple[int, ...]]) -> int:
    """The most tokens that follow a prompt and are read."""
    return reasoner.tokens_after if reasoner else max(map(len, choices)) - 1


class Answers(NamedTuple):
    """What a judge answered. "side" is the order of a pair, or which response is rated."""

    logprobs: np.ndarray  # [pairs, side, sample, question, choice] float64; NaN where a prompt is not scored
    lengths: np.ndarray  # [pairs, side] tokens of the longest prompt
    fits: np.ndarray  # [pairs] bool: all prompts, and what is to follow them, are within the judge's length
    rationales: dict[tuple[int, int], list[str]]  # (pair, side) -> one a sample


def answer_pairs(
    judge: Judge, pairs: Sequence[Pair], plan: Plan, ids: Sequence[int], on_prompts: Callable[[float], object]
) -> Answers:
    """The log-probabilities of all choices to all questions; the arguments are those of `judge_pairs`."""
    judge = judge.moved(to_device)
    rests = [suffix_tokens(judge, pair) for pair in pairs]
    lengths = np.array([[len(rest) for rest in prompts] for prompts in rests]).reshape(len(pairs), 2, -1).max(axis=2)
    lengths += len(judge.preamble)
    fits = np.all(lengths + _tokens_after(judge.reasoner, judge.choices) <= judge.config.max_length, axis=1)
    shape = (len(pairs), 2, judge.samples, len(judge.template.questions), len(judge.choices))
    answers = Answers(np.full(shape, np.nan), lengths, fits, {})
    wanted = {i: None for i, pair in enumerate(pairs) if fits[i] and pair.response_a != pair.response_b}
    with judge.on_its_mesh():
        if judge.reasoner:
            sides = [(i, side) for i in wanted for side in (0, 1)]
            prompts, numbers = [rests[i][side] for i, side in sides], [2 * ids[i] + side for i, side in sides]
            for prompt, sample, text, scores in reason(judge.reasoner, prompts, numbers):
                answers.logprobs[sides[prompt]][sample] = scores
                answers.rationales.setdefault(sides[prompt], [""] * judge.samples)[sample] = text
                on_prompts(1 / judge.samples)
        else:
            for chosen, scores in _score(judge, pairs, wanted, rests, plan):
                answers.logprobs[chosen, :, 0] = scores
                on_prompts(2 * len(chosen))
    return answers


def pair_hashes(judge: Judge, pair: Pair) -> tuple[str, str]:
    """Hashes of the text of a pair's prompts, by side: what tells whether two labels are of the same question."""
    texts = [prompt.text for prompt in judge.template.asked(pair)]
    half = len(texts) // 2
    return text_hash("\x00".join(texts[:half])), text_hash("\x00".join(texts[half:]))


def _judgement(judge: Judge, pair: Pair, i: int, answers: Answers) -> Judgement:
    found = verdict(judge.template, exclusive(answers.logprobs[i], judge.choices))
    status = "ok" if found else "not_finite"
    if not answers.fits[i]:
        status = "too_long"
    elif pair.response_a == pair.response_b:
        status = "identical"
    rationales = (answers.rationales.get((i, side)) for side in (0, 1))
    found = found if status == "ok" else None
    return Judgement(status, found, *rationales, *answers.lengths[i].tolist(), *pair_hashes(judge, pair))


def _score(
    judge: Judge, pairs: Sequence[Pair], wanted: Collection[int], rests: list[list[list[int]]], plan: Plan
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Log-probs without rationales: yields (pairs, [pairs, side, question, choice] float64) tree by tree."""
    # Grouped as planned: what can't be scored leaves its group, and parts no other.
    groups = ([i for i in group if i in wanted] for group in _groups(pairs, judge.config.pairs_per_tree))
    members = [group for group in groups if group]
    trees = [grow([rest for i in group for rest in rests[i]], judge.choices) for group in members]
    for index, logprobs in score_trees(judge.scorer, trees, plan.buckets, plan.asked):
        chosen, questions = members[index], len(judge.template.questions)
        scores = sum_by_choice(logprobs, 2 * len(chosen) * questions, judge.choices)
        yield chosen, scores.reshape(len(chosen), 2, questions, -1)


def _groups(pairs: Sequence[Pair], limit: int) -> list[list[int]]:
    """Numbers of consecutive pairs that compare responses to one prompt, at most `limit` of them together."""
    groups = []
    for _, same in itertools.groupby(range(len(pairs)), key=lambda i: pairs[i].prompt):
        numbers = list(same)
        groups += [numbers[start : start + limit] for start in range(0, len(numbers), limit)]
    return groups


def rate(judge: Judge, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """The rating of each response by itself, from -1 to 1 (direct RLAIF, arXiv 2309.00267, section 2.2.2).

    Of several processes each rates a part, and all get the whole. Returns [n] float64; NaN for what is too long for the
    judge, or scored as not finite.
    """
    work = functools.partial(_rate, judge)
    found = work(prompts, responses) if judge.everywhere else processes.parted(prompts, work, responses)
    return np.array(found, float)


def _rate(judge: Judge, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    rests = _suffixes(judge, list(map(judge.template.rated, prompts, responses)))
    room = judge.config.max_length - len(judge.preamble) - _tokens_after(None, judge.choices)
    fitting = [i for i, rest in enumerate(rests) if len(rest) <= room]
    trees = [grow([rests[i]], judge.choices) for i in fitting]
    asked = sum(map(len, judge.choices))
    ratings = np.full(len(rests), np.nan)
    with judge.on_its_mesh():
        answers = list(score_trees(judge.moved(to_device).scorer, trees, _ladder(judge.config), asked))
    for tree, logprobs in answers:
        scores = exclusive(sum_by_choice(logprobs, 1, judge.choices), judge.choices)[0]
        if not np.any(np.isnan(scores)) and np.isfinite(scores.max()):
            ratings[fitting[tree]] = rating(normalise(scores))
    return ratings.tolist()


def _ladder(config: JudgeConfig) -> list[int]:
    """Padded lengths that do not depend on a job, for small jobs: each at most half as long again
    as the one before."""
    lengths = [config.bucket_multiple]
    while lengths[-1] < config.max_length:
        step = lengths[-1] // 2 // config.bucket_multiple * config.bucket_multiple
        lengths.append(lengths[-1] + max(step, config.bucket_multiple))
    return lengths


def suffix_tokens(judge: Judge, pair: Pair) -> list[list[int]]:
    """What follows the preamble's tokens in each prompt of a pair."""
    return _suffixes(judge, judge.template.asked(pair))


def _suffixes(judge: Judge, prompts: Sequence[Prompt]) -> list[list[int]]:
    count, rests = len(judge.preamble), []
    for prompt, tokens in zip(prompts, encode(judge.tokenizer, prompts), strict=True):
        if tuple(tokens[:count]) != judge.preamble:  # a tokenizer that looks far ahead: the same text, split here
            (opening,) = encode(judge.tokenizer, [prompt._replace(message="", turn="", reply="")])
            said = tokens_to_text(judge.tokenizer, judge.preamble[len(opening) :])
            blank = said.startswith(" ") and not prompt.message.startswith(said)  # the tokenizer's own, before the text
            message = prompt.message[len(said) - blank :]
            (rest,) = encode(judge.tokenizer, [prompt._replace(opening="", message=message)], continuing=True)
            tokens = [*judge.preamble, *rest]
        rests.append(tokens[count:])
    return rests


def _shared_tokens(tokenizer: PreTrainedTokenizerFast, template: Template) -> tuple[int, ...]:
    """The tokens that all prompts of a template begin with, whatever their texts begin with."""
    prompts = [prompt for begin in _BEGINNINGS for prompt in template.asked(Pair(*[begin] * 5))]
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*encode(tokenizer, prompts), strict=False))
    return tuple(tokens[0] for tokens in alike)


@functools.partial(jax.jit, static_argnames="model")
def read_prefix(model: LanguageModel, params, tokens: jax.Array) -> KVCache:
    """The cache of one row, all of it real tokens, of whatever length."""
    _, cache = model.apply({"params": params}, tokens, jnp.ones_like(tokens), keep_keys=True, odd=("length",))
    return cache.replace(mask=None)
