"""Learning from pairs without a reward model: DPO, IPO and SLiC, on the labels or on pairs made and judged online."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
from flax import struct

from rlaif_jax.config import PreferenceConfig
from rlaif_jax.data.encoding import decode_responses
from rlaif_jax.errors import UserError
from rlaif_jax.files import read_parquet, there, write_parquet
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import Judgement, judge_live, live_plan, load_judge
from rlaif_jax.judge.store import UNSCORED
from rlaif_jax.losses.preference import preference_loss
from rlaif_jax.models.lora import joined, start
from rlaif_jax.models.parameters import to_device
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.mesh import shard_batch
from rlaif_jax.stages.preferences import (
    Comparisons,
    clamped,
    encode_comparisons,
    learned_labels,
    read_preferences,
)
from rlaif_jax.stages.principles import comparison_principles, draw_principles, draws
from rlaif_jax.stages.reading import policy_reader
from rlaif_jax.stages.replies import padded_batches
from rlaif_jax.stages.rollouts import Rollouts
from rlaif_jax.stages.run import Run, shuffled_batches
from rlaif_jax.training.loop import LoopConfig, train
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.sequences import Sequences, response_logprobs
from rlaif_jax.training.state import TrainState, abstract_state, init_state
from rlaif_jax.training.step import compiled_step


class PreferenceBatch(struct.PyTreeNode):
    """Labelled pairs with what the reference says of them; [batch] float32 each."""

    pairs: Comparisons
    ref_a: jax.Array  # log-prob of response a, summed over its tokens
    ref_b: jax.Array


class Step(NamedTuple):
    """What a step trains on, and what it says of it."""

    batch: PreferenceBatch
    metrics: dict
    samples: Callable[[], list[dict]]


def run_preference(run: Run) -> None:
    """Reads the policy (`Run.start`), and labels or the judge; writes `preference/checkpoints`.

    Offline also `preference/reference.parquet`: the reference's log-prob of every response, worked out once.
    """
    config, model, lora = run.config.preference, run.language_model(), run.lora("preference")
    reference = run.waiting("reference", run.base_params("preference"))
    begin = start(model, lora, lambda: to_device(reference), run.key("preference adapter"), run.placement)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step_fn = step_function(model, optimizer, config)
    make_step = (_online if config.online else _offline)(run, model, reference)

    def next_step(state: TrainState, step: int):
        batch, metrics, samples = make_step(joined(begin.frozen, state.params), step)
        state, trained = step_fn(state, batch, frozen=begin.frozen)
        return state, metrics | trained, samples

    train(
        run.folder("preference"),
        LoopConfig(config.steps, config.checkpoint_every, config.keep_best, config.max_skipped_updates),
        abstract_state(model, optimizer, run.placement, lora),
        lambda: init_state(model, begin.trained(), optimizer, run.placement, lora),
        next_step,
        functools.partial(_watch, config.max_unscored_rate),
    )


def step_function(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: PreferenceConfig
) -> jax.stages.Wrapped:
    """(state, PreferenceBatch, frozen) -> (state, metrics)."""
    loss = functools.partial(loss_of_pairs, model=model, config=config)
    return compiled_step(loss, optimizer, config.micro_batches)


def loss_of_pairs(params, batch: PreferenceBatch, model: LanguageModel, config: PreferenceConfig):
    """Weighted sum over pairs, their weight, and sums of metrics: a `training.step.Loss`.

    Implicit rewards are beta log(policy / reference) (Rafailov et al., arXiv 2305.18290, section 4); "chosen" is the
    response that the label prefers.
    """
    a, b, prob_a, weight = batch.pairs.a, batch.pairs.b, batch.pairs.prob_a, batch.pairs.weight
    logprob_a, logprob_b = (_total_logprobs(model, params, x, config.sampling.temperature) for x in (a, b))
    ratio_a, ratio_b = logprob_a - batch.ref_a, logprob_b - batch.ref_b
    if config.length_normalise:
        ratio_a, ratio_b = (ratio / _lengths(x) for ratio, x in ((ratio_a, a), (ratio_b, b)))
    total, count = preference_loss(ratio_a - ratio_b, prob_a, weight, config.loss, config.beta)

    first = prob_a > 0.5
    pick = lambda x, y: (jnp.where(first, x, y), jnp.where(first, y, x))  # noqa: E731
    chosen, rejected = pick(config.beta * ratio_a, config.beta * ratio_b)
    chosen_logprob, rejected_logprob = pick(logprob_a, logprob_b)
    decided = weight * (prob_a != 0.5)  # a tie has no chosen response
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": chosen_logprob,
        "logps/rejected": rejected_logprob,
    }
    return total, count, {name: (jnp.sum(decided * x), jnp.sum(decided)) for name, x in metrics.items()}


def _total_logprobs(model: LanguageModel, params, sequences: Sequences, temperature: float) -> jax.Array:
    return jnp.sum(response_logprobs(model, params, sequences, temperature), axis=1)


reference_logprobs = jax.jit(_total_logprobs, static_argnums=(0, 3))


def _lengths(sequences: Sequences) -> jax.Array:
    return jnp.maximum(jnp.sum(sequences.response_mask, axis=1), 1)


def _offline(run: Run, model: LanguageModel, reference):
    """Steps over the labels, in shuffled epochs."""
    config = run.config.preference
    table = read_preferences(run)
    pairs = encode_comparisons(policy_reader(run), table)
    ref_a, ref_b = _stored_reference(run, model, reference, pairs)
    whole = PreferenceBatch(pairs, ref_a, ref_b)
    order = run.order_seed("preference")
    batches = shuffled_batches(range(len(ref_a)), config.batch_size, order, "preference.batch_size")

    def step_of(params, step: int) -> Step:
        rows = np.asarray(batches[step])
        batch = jax.tree.map(lambda x: x[rows], whole)
        return Step(shard_batch(batch, run.placement.mesh), {"tokens": _tokens(batch.pairs)}, list)

    return step_of


def _stored_reference(run: Run, model: LanguageModel, reference, pairs: Comparisons) -> tuple[np.ndarray, np.ndarray]:
    """The reference's log-prob of each response: two [pairs] float32, from `reference.parquet`, made if missing."""
    config, file = run.config.preference, run.folder("preference") / "reference.parquet"
    if not there(file):
        columns, reference = {}, to_device(reference)
        for name in ("a", "b"):
            found = [
                processes.to_host(reference_logprobs(model, reference, batch, config.sampling.temperature))[:rows]
                for rows, batch in padded_batches(getattr(pairs, name), config.batch_size, run.placement)
            ]
            columns[f"ref_logprob_{name}"] = np.concatenate(found)
        write_parquet(file, pa.table(columns))
    stored = read_parquet(file)
    if stored.num_rows != len(pairs.prob_a):
        raise UserError(f"{file} has {stored.num_rows} rows for {len(pairs.prob_a)} labels: delete it")
    return tuple(stored[f"ref_logprob_{name}"].to_numpy() for name in ("a", "b"))


def _online(run: Run, model: LanguageModel, reference):
    """Steps over pairs of the live policy, judged at once (OAIF: Guo et al., arXiv 2402.04792, algorithm 1)."""
    config, tokenizer, mesh = run.config.preference, run.tokenizer(), run.placement.mesh
    rollouts = Rollouts(
        run, "preference", config.batch_size, 2, config.sampling, "preference.batch_size", one_shape=False
    )
    judge = load_judge(run.config.judge, run.config.seed, run.judge_placement)
    judge = judge.moved(functools.partial(run.waiting, "judge"))
    plan = live_plan(judge)
    principles = comparison_principles(run, "preference") if judge.template.by_principle else []

    def step_of(params, step: int) -> Step:
        sampled = rollouts.sample(params, step).sequences
        sides = [jax.tree.map(lambda x, side=side: x[side::2], sampled) for side in (0, 1)]
        on_device = to_device(reference)
        references = [reference_logprobs(model, on_device, side, config.sampling.temperature) for side in sides]
        del on_device
        host = processes.to_host(sampled)
        texts = decode_responses(tokenizer, host.responses, host.response_mask)
        prompts = rollouts.prompts(step)[::2]
        asked = list(map(Pair, prompts, texts[::2], texts[1::2]))
        ids = range(step * config.batch_size, (step + 1) * config.batch_size)
        if principles:
            asked = draw_principles(principles, draws(run), asked, ids)
        judged = judge_live(judge, asked, plan, ids)
        prob_a, weight = _labels(run, judged, step)
        batch = PreferenceBatch(Comparisons(*sides, *shard_batch((prob_a, weight), mesh)), *references)
        lengths = host.response_mask.sum(axis=1)
        metrics = {
            "tokens": host.prompt_mask.sum() + lengths.sum(),
            "response_length": lengths.mean(),
            "unscored": np.mean([each.status in UNSCORED for each in judged]),
            "identical": np.mean([each.status == "identical" for each in judged]),
        }

        def shown() -> list[dict]:
            if step % config.samples_every and step + 1 < config.steps:
                return []
            pair, label = asked[0], float(prob_a[0]) if weight[0] else None
            texts = {"prompt": pair.prompt, "response_a": pair.response_a, "response_b": pair.response_b}
            hashes = {name: getattr(judged[0], name) for name in ("hash_forward", "hash_reversed")}
            return [texts | {"prob_a": label, "principle": pair.principle} | hashes]

        return Step(batch, metrics, shown)

    return step_of


def _labels(run: Run, judged: list[Judgement], step: int) -> tuple[np.ndarray, np.ndarray]:
    """What is learned of each judgement, and its weight, 0 where there is none: two [pairs] float32."""
    config = run.config.preferences
    name = "prob_a" if config.order == "both" else f"prob_a_{config.order}"
    prob_a = np.array([getattr(each.verdict, name) if each.verdict else 0.5 for each in judged])
    rng = np.random.default_rng([run.order_seed("preferences"), step])
    weight = np.array([each.status == "ok" for each in judged], np.float32)
    return learned_labels(clamped(prob_a, config.clamp), config, rng).astype(np.float32), weight


def _tokens(pairs: Comparisons) -> int:
    return sum(side.prompt_mask.sum() + side.response_mask.sum() for side in (pairs.a, pairs.b))


def _watch(limit: float, step: int, metrics: dict) -> None:
    if metrics.get("unscored", 0) > limit:
        raise UserError(
            f"stage preference stopped at step {step}: the judge could not score {metrics['unscored']:.1%} of the "
            f"pairs, more than config.preference.max_unscored_rate={limit:g}"
        )
