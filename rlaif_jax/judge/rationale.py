"""Chain of thought in two steps: rationales are sampled, and the answers scored right after each, from the same cache.

Lee et al., arXiv 2309.00267, section 2.1.2; several rationales are self-consistency (appendix L there).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data.encoding import texts_to_tokens, tokens_to_text
from rlaif_jax.judge.prompts import Template
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.processes import put
from rlaif_jax.sampling.continuous import Sampler, SamplerConfig, Slots, sample
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.stopping import cut, make_stopping
from rlaif_jax.sampling.trees import Scorer, Tokens, Tree, answer_logprobs, grow, sum_by_choice


@dataclasses.dataclass(frozen=True)
class RationaleConfig:
    """How rationales are written."""

    samples: int  # rationales a prompt; the distributions after them are averaged
    max_new_tokens: int
    sampling: SamplingConfig
    sampler: SamplerConfig


@dataclasses.dataclass(frozen=True)
class Reasoner:
    """A judge that explains itself before it answers."""

    sampler: Sampler
    samples: int  # rationales a prompt
    tokenizer: PreTrainedTokenizerFast
    template: Template
    verdict: Tree  # what follows a rationale: the questions and the choices
    choices: Sequence[Tokens]
    seed: int

    @property
    def tokens_after(self) -> int:
        """The most tokens that follow a prompt."""
        return self.sampler.max_new_tokens + len(self.verdict)


def make_reasoner(
    config: RationaleConfig,
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    scorer: Scorer,
    choices: Sequence[Tokens],
    seed: int,
) -> Reasoner:
    """A reasoner on the scorer's model, whose layers must be separate, and its preamble."""
    stopping = make_stopping(tokenizer, template.reasoning.stop)
    sampler = Sampler(
        scorer.model,
        scorer.params,
        scorer.placement,
        stopping,
        config.sampling,
        config.max_new_tokens,
        config.sampler,
        scorer.prefix,
    )
    verdict = grow(texts_to_tokens(tokenizer, _questions(template), continuing=True), choices)
    return Reasoner(sampler, config.samples, tokenizer, template, verdict, choices, seed)


def _questions(template: Template) -> list[str]:
    """What may follow a rationale: the questions, and for each stop text the questions without it at their beginning.

    A rationale that ended with a stop text has it already, and a question is to follow as it does in worked examples.
    """
    beginnings = ("", *template.reasoning.stop)
    return [question.removeprefix(beginning) for beginning in beginnings for question in template.questions]


def reason(
    reasoner: Reasoner, prompts: Sequence[Tokens], prompt_ids: Sequence[int]
) -> Iterator[tuple[int, int, str, np.ndarray]]:
    """Yields (prompt, sample, rationale, log-probs [questions, choices] float64) as rationales end.

    A rationale depends on its prompt, on the prompt's id and on the sample's number.
    """
    sampler, verdict, samples = reasoner.sampler, reasoner.verdict, reasoner.samples
    whole = sampler.placement.whole
    row_ids = [samples * i + sample for i in prompt_ids for sample in range(samples)]
    tree = [np.array(x, np.int32) for x in (verdict.tokens, verdict.positions, verdict.ends, verdict.asked_after)]
    conclude = functools.partial(
        _conclude,
        sampler.model,
        sampler.parameters,
        prefixes=sampler.prefixes,
        tree=[put(x, whole) for x in tree],
        asked=put(np.array(verdict.asked_token, np.int32), whole),
        eos=sampler.stopping.eos_token_ids,
    )
    key = jax.jit(jax.random.key, out_shardings=whole)(reasoner.seed)
    for row, reply in sample(sampler, prompts, key, row_ids, conclude=conclude):
        text = tokens_to_text(reasoner.tokenizer, reply.tokens)
        stops, count = reasoner.template.reasoning.stop, len(reasoner.template.questions)
        scores = sum_by_choice(reply.conclusion, (1 + len(stops)) * count, reasoner.choices)
        found = next((1 + i for i, stop in enumerate(stops) if text.endswith(stop)), 0)
        yield *divmod(row, samples), cut(text, stops), scores[found * count : (found + 1) * count]


@functools.partial(jax.jit, static_argnames=("model", "eos"))
def _conclude(model: LanguageModel, parameters, slots: Slots, *, prefixes, tree, asked, eos: tuple[int, ...]):
    """The questions of `tree` after each reply: [slots, questions] float32.

    The cache holds all but a reply's last token. It comes first here, unless it is an end of sequence, which the
    judge is not shown.
    """
    tokens, positions, ends, asked_after = tree
    replies, rows = slots.replies, len(slots.replies.done)
    last = jnp.take_along_axis(replies.samples.tokens, jnp.maximum(replies.length - 1, 0)[:, None], axis=1)
    shown = ~jnp.isin(last, jnp.asarray(eos, jnp.int32))
    before = (replies.prompt_length + replies.length)[:, None]

    def every(x):
        return jnp.broadcast_to(x, (rows, len(x)))

    row = jnp.concatenate([last, every(tokens)], axis=1)
    segment_ids = jnp.concatenate([shown.astype(jnp.int32), jnp.ones((rows, len(tokens)), jnp.int32)], axis=1)
    row_positions = jnp.concatenate([before - 1, before - ~shown + every(positions)], axis=1)
    row_ends = every(jnp.concatenate([jnp.array([1 + len(tokens)]), 1 + ends]))
    hidden, _ = model.apply(
        {"params": parameters},
        row,
        segment_ids,
        row_positions,
        ends=row_ends,
        odd=("length",),
        prefixes=(*prefixes, slots.prompts, replies.cache),
    )
    return answer_logprobs(model, parameters, hidden, every(1 + asked_after), every(asked))
