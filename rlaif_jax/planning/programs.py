"""The programs that the stages of a run compile, with all that they take and all that is in memory beside them.

They are the very functions that the stages call; nothing is loaded, and lengths are the longest that the config allows.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlaif_jax.judge.score import read_prefix
from rlaif_jax.models.lora import abstract_trained, joined
from rlaif_jax.models.parameters import (
    Placement,
    decoding_model,
    to_decoding,
)
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.mesh import DECODE_RULES, JUDGE_RULES, Rules, batch_ways
from rlaif_jax.planning.roles import (
    AbstractJudge,
    Arrays,
    abstract_judge,
    abstract_reward_model,
    decoding_shapes,
    frozen_shapes,
    trained_shapes,
)
from rlaif_jax.sampling.continuous import advance, empty_slots, insert
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.trees import rows_of_batch, tree_logprobs
from rlaif_jax.stages import preference, reward_model, sft
from rlaif_jax.stages.evaluate import measure
from rlaif_jax.stages.preference import PreferenceBatch, reference_logprobs
from rlaif_jax.stages.rl import abstract_rl_state, abstract_sampled, update_function
from rlaif_jax.stages.run import Run
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.reward_models import RewardModel, side_by_side
from rlaif_jax.training.rollout import Frozen, make_rollout
from rlaif_jax.training.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Program:
    """One of them."""

    stage: str
    name: str
    function: jax.stages.Wrapped
    arguments: tuple
    keywords: dict
    mesh: Mesh
    calls: int  # in the run; 0 where the config does not tell
    tokens: int = 0  # of a call, padding included
    trips: int = 1  # the most that a loop runs whose length the data decide
    beside: tuple = ()  # trees in memory at the same time that are no argument
    shared: tuple = ()  # trees that are a part of two arguments, and in memory once

    @property
    def title(self) -> str:
        """What --programs calls it."""
        return f"{self.stage}/{self.name}"


def programs_of(run: Run, stages: Sequence[str] = ()) -> Iterator[Program]:
    """All programs of the config's stages, or of some of them, that take time."""
    for stage in run.config.stages:
        rounds = 1 if stage == "sft" else run.config.rounds
        wanted = stage in _STAGES and (not stages or stage in stages)
        for program in _STAGES[stage](run) if wanted else ():
            yield dataclasses.replace(program, calls=program.calls * rounds)


def unplanned(run: Run) -> list[str]:
    """What of the config's stages no program stands for."""
    left_out = [stage for stage in run.config.stages if stage not in _STAGES]
    judges = [*run.config.panel.judges.values()] or [run.config.judge]
    if any(judge.prompt.chain_of_thought for judge in judges) and "label" in run.config.stages:
        left_out.append("rationales of the judge")
    if "sft" in run.config.stages and run.config.sft.teacher.weights:
        left_out.append("demonstrations of the teacher")
    return left_out


def _sft(run: Run) -> Iterator[Program]:
    return _tuning(run, "sft")


def _tuning(run: Run, stage: str) -> Iterator[Program]:
    config, length = getattr(run.config, stage), run.config.sft.row_length
    model, optimizer = run.language_model(), make_optimizer(config.optimizer, config.steps)
    state, batch = abstract_state(model, optimizer, run.placement, run.lora(stage)), Arrays(run.placement)
    batch, step = batch.packed(config.batch_size, length), sft.step_function(model, optimizer, config)
    keywords = {"frozen": frozen_shapes(run, stage, model)}
    yield Program(
        stage, "step", step, (state, batch), keywords, run.placement.mesh, config.steps, config.batch_size * length
    )


def _label(run: Run) -> Iterator[Program]:
    config = run.config.label
    judges = [abstract_judge(run, judge) for judge in run.config.panel.judges.values()]
    judges = judges or [abstract_judge(run, run.config.judge)]
    beside = (judges[0].parameters, judges[0].prefix) if not run.config.panel.judges else ()  # it is loaded first
    yield from _sampling(run, "label", config.pairs, 2, config.sampling, beside)
    for judge, name in zip(judges, run.config.panel.judges or ("judge",), strict=True):
        yield from _judging(run, "label", name, judge, config.pairs, 1)


def _sampling(
    run: Run, stage: str, prompts: int, copies: int, sampling: SamplingConfig, beside: tuple
) -> Iterator[Program]:
    """Continuous batching by the policy (`sampling.continuous.sample`)."""
    config, policy, arrays, mesh = run.config.sampler, run.config.policy, Arrays(run.placement), run.placement.mesh
    stacked, limit = run.language_model(), policy.max_response_length
    model, weights = decoding_model(stacked), trained_shapes(stacked, run.placement)
    parameters, stopping = decoding_shapes(stacked, run.placement), arrays.stopping
    cache_dtype, read = config.cache_dtype or stacked.config.dtype, max(min(config.refill, config.slots // copies), 1)
    yield Program(
        stage,
        "decode_weights",
        _to_decoding(stacked, run.placement, DECODE_RULES),
        (weights,),
        {},
        mesh,
        1,
        beside=beside,
    )
    shape = config.slots, policy.max_prompt_length, limit, limit + config.chunk - 1
    with jax.set_mesh(mesh):
        slots = jax.eval_shape(
            functools.partial(empty_slots, model, shape=shape, cache_dtype=cache_dtype), parameters, (), stopping
        )
    replies = arrays.all_whole(slots.replies.replace(cache=None)).replace(cache=arrays.cache(slots.replies.cache))
    slots, beside = slots.replace(replies=replies, prompts=arrays.cache(slots.prompts)), (weights, *beside)
    length = policy.max_prompt_length
    read_in = [arrays.whole(jnp.int32, read, length), arrays.whole(jnp.bool_, read, length)]
    read_in += [arrays.whole(jnp.int32, read * copies)] * 2
    yield Program(
        stage, "prefill", insert, (model, parameters, slots, (), stopping, *read_in, arrays.key),
        {"sampling": sampling, "cache_dtype": cache_dtype}, mesh, math.ceil(prompts / read), read * length,
        beside=beside,
    )  # fmt: skip
    chunks = math.ceil(prompts * copies / config.slots) * math.ceil(limit / config.chunk)
    yield Program(
        stage, "decode", advance, (model, parameters, slots, (), stopping),
        {"sampling": sampling, "chunk": config.chunk}, mesh, chunks, config.slots * config.chunk, config.chunk,
        beside,
    )  # fmt: skip


def _judging(
    run: Run, stage: str, name: str, judge: AbstractJudge, items: int, loads: int, beside: tuple = ()
) -> Iterator[Program]:
    """A judge that is loaded and scores so many pairs, or responses where it rates each."""
    mesh = judge.placement.mesh
    loaded = judge.loaded
    convert = _to_decoding(judge.stacked, judge.placement, JUDGE_RULES)
    yield Program(stage, f"{name}_weights", convert, (loaded,), {}, mesh, loads, beside=beside)
    arguments = judge.model, judge.parameters, judge.preamble
    yield Program(
        stage, f"{name}_preamble", read_prefix, arguments, {}, mesh, loads, judge.preamble.shape[1],
        beside=(loaded, *beside),
    )  # fmt: skip
    length = judge.tree_length
    rows = rows_of_batch(length, judge.config.batch_tokens, batch_ways(mesh))
    arrays = Arrays(judge.placement)
    tokens, asked = arrays.rows(jnp.int32, rows, length), arrays.rows(jnp.int32, rows, judge.asked)
    trees = math.ceil(items / judge.config.pairs_per_tree)
    copies = run.placement.mesh.size // mesh.size  # judges beside each other, each with rows of its own
    yield Program(
        stage, name, tree_logprobs, (judge.model, judge.parameters, (judge.prefix,), *[tokens] * 3, *[asked] * 2), {},
        mesh, math.ceil(trees / (rows * copies)), rows * length, beside=beside,
    )  # fmt: skip


def _reward_model(run: Run) -> Iterator[Program]:
    config, model, lengths = run.config.reward_model, run.reward_model(), run.config.reward_lengths
    optimizer = make_optimizer(config.optimizer, config.steps)
    lora, frozen = run.lora("reward_model"), frozen_shapes(run, "reward_model", model)
    state = side_by_side(abstract_state(model, optimizer, run.placement, lora), config.members)
    batch = Arrays(run.placement).comparisons(config.batch_size, lengths)
    step = reward_model.step_function(model, optimizer, config)
    arguments = state, [batch] * config.members, frozen
    tokens = config.members * 2 * config.batch_size * sum(lengths)
    yield Program("reward_model", "step", step, arguments, {}, run.placement.mesh, config.steps, tokens=tokens)


def _rl(run: Run) -> Iterator[Program]:
    config, arrays, mesh = run.config.rl, Arrays(run.placement), run.placement.mesh
    model, scalar_model = run.language_model(), run.scalar_model()
    state, shapes = abstract_rl_state(run), trained_shapes(model, run.placement)
    rewards = abstract_reward_model(run) if config.rewards.reward_model else None
    trained_on = Frozen(frozen_shapes(run, "rl", model), {})
    if config.advantage == "gae":
        trained_on = trained_on._replace(value=frozen_shapes(run, "rl", scalar_model))
    shared = (trained_on.value,) if config.value_init == "sft" else ()  # with the policy, that of the reference
    of_value = () if shared else (trained_on.value,)
    reference = None if trained_on.policy else shapes
    frozen = (*_resident(run, reference=shapes, reward_model=rewards), *of_value)
    judging = _live_judges(run)
    loaded = tuple((judge.parameters, judge.prefix) for judge in judging.values())
    judges = _resident(run, judge=loaded)
    yield from _generating(run, "rl", config.batch_size, config.group_size, config.sampling, config.steps,
                           (state, *frozen, *judges))  # fmt: skip
    for name, judge in judging.items():
        for program in _judging(run, "rl", name, judge, config.batch_size, 1, (state, *frozen)):
            yield dataclasses.replace(program, calls=program.calls * (config.steps if program.name == name else 1))
    sampled, scores = abstract_sampled(run), arrays.rows(jnp.float32, config.batch_size)
    in_rollout, beside = rewards, judges
    if rewards and run.config.reward_model.weights:
        waiting = _resident(run, reference=shapes)
        yield _scoring(run, "rl", rewards, config.steps, config.batch_size, (state, *waiting, *judges))
        in_rollout, beside = None, (*_resident(run, reward_model=rewards), *judges)
    arguments = model, scalar_model, state, reference, in_rollout, sampled, scores, trained_on
    tokens, keywords = config.batch_size * _length(run), {"config": config}
    yield Program(
        "rl", "rollout", make_rollout, arguments, keywords, mesh, config.steps, tokens, beside=beside, shared=shared
    )
    with jax.set_mesh(mesh):
        rollout = jax.eval_shape(functools.partial(make_rollout, model, scalar_model, config=config), *arguments[2:])[0]
    rows = config.ptx_rows * config.epochs * config.minibatches
    demonstrations = arrays.packed(rows, run.config.sft.row_length) if config.ptx_coef else None
    exact_kl = config.kl.placement == "loss" and config.kl.estimator == "full"
    arguments = (state.replace(control=None), arrays.all_rows(rollout), arrays.whole(jnp.float32),
                 reference if exact_kl else None, demonstrations, arrays.key, trained_on)  # fmt: skip
    beside = (*_resident(run, reference=None if exact_kl else reference, reward_model=rewards), *judges)
    yield Program(
        "rl", "update", update_function(run), arguments, {}, mesh, config.steps, tokens * config.epochs, beside=beside,
        shared=shared,
    )  # fmt: skip


def _scoring(run: Run, stage: str, rewards: RewardModel, times: int, responses: int, beside: tuple) -> Program:
    """A reward model with a tokenizer of its own, which so many responses are encoded for so many times."""
    rows, lengths = run.config.evaluation.batch_size, run.config.reward_lengths
    arguments = run.reward_model(), rewards.params, Arrays(run.placement).sequences(rows, lengths)
    calls = times * math.ceil(responses / rows)
    return Program(
        stage, "reward_model", reward_model.score_members, arguments, {}, run.placement.mesh, calls,
        rows * sum(lengths), beside=beside,
    )  # fmt: skip


def _live_judges(run: Run) -> dict[str, AbstractJudge]:
    """The judges that rate in RL, for the reward and for gold."""
    rewards, gold, judges = run.config.rl.rewards, run.config.rl.gold, {}
    if rewards.judge:
        judges["judge"] = abstract_judge(run, run.config.judge, rewards.judge_prompt)
    if gold.judge:
        config = dataclasses.replace(run.config.judge, weights=gold.judge_weights or run.config.judge.weights)
        judges["gold_judge"] = abstract_judge(run, config, gold.judge_prompt)
    return judges


def _generating(
    run: Run, stage: str, rows: int, copies: int, sampling: SamplingConfig, calls: int, beside: tuple
) -> Iterator[Program]:
    """The responses of a step (`stages.rollouts`)."""
    policy, arrays, mesh, stacked = run.config.policy, Arrays(run.placement), run.placement.mesh, run.language_model()
    # Of the state, which is beside it; and what its adapter is trained on, the reference, which is the next.
    frozen = frozen_shapes(run, stage, stacked)
    weights = joined(frozen, abstract_trained(stacked, run.placement, run.lora(stage)))
    others = (beside[0].replace(params=()), *beside[2 if frozen else 1 :])
    convert = _to_decoding(stacked, run.placement, DECODE_RULES)
    yield Program(stage, "decode_weights", convert, (weights,), {}, mesh, calls, beside=others)
    parameters = decoding_shapes(stacked, run.placement)
    length, limit = policy.max_prompt_length, policy.max_response_length
    prompts, mask = (arrays.rows(dtype, rows // copies, length) for dtype in (jnp.int32, jnp.bool_))
    arguments = decoding_model(stacked), parameters, prompts, mask, arrays.key, arrays.rows(jnp.int32, rows)
    keywords = {"max_new_tokens": limit, "sampling": sampling}
    keywords["cache_dtype"] = run.config.sampler.cache_dtype or stacked.config.dtype
    yield Program(
        stage, "generate", generate, (*arguments, arrays.stopping), keywords, mesh, calls, rows * limit, limit - 1,
        beside,
    )  # fmt: skip


def _preference(run: Run) -> Iterator[Program]:
    config, arrays, mesh, model = run.config.preference, Arrays(run.placement), run.placement.mesh, run.language_model()
    reference, optimizer = trained_shapes(model, run.placement), make_optimizer(config.optimizer, config.steps)
    state = abstract_state(model, optimizer, run.placement, run.lora("preference"))
    judge = abstract_judge(run, run.config.judge) if config.online else None
    loaded = _resident(run, judge=(judge.parameters, judge.prefix) if judge else ())
    waiting = _resident(run, reference=reference)
    if judge:
        yield from _generating(run, "preference", 2 * config.batch_size, 2, config.sampling, config.steps,
                               (state, *waiting, *loaded))  # fmt: skip
        for program in _judging(run, "preference", "judge", judge, config.batch_size, 1, (state, *waiting)):
            yield dataclasses.replace(program, calls=program.calls * (config.steps if program.name == "judge" else 1))
    side = arrays.sequences(config.batch_size, run.config.policy.lengths)
    pairs = config.steps * config.batch_size if config.online else run.config.label.pairs
    yield Program(
        "preference", "reference", reference_logprobs, (model, reference, side, config.sampling.temperature), {}, mesh,
        2 * math.ceil(pairs / config.batch_size), config.batch_size * _length(run),
        beside=(state, *loaded) if config.online else (),
    )  # fmt: skip
    number = arrays.rows(jnp.float32, config.batch_size)
    batch = PreferenceBatch(arrays.comparisons(config.batch_size, run.config.policy.lengths), number, number)
    step = preference.step_function(model, optimizer, config)
    tokens = 2 * config.batch_size * _length(run)
    frozen = frozen_shapes(run, "preference", model)  # the reference itself
    yield Program(
        "preference", "step", step, (state, batch), {"frozen": frozen}, mesh, config.steps, tokens,
        beside=(*(() if frozen else waiting), *loaded),
    )  # fmt: skip


def _best_of_n(run: Run) -> Iterator[Program]:
    config = run.config.best_of_n
    yield from _sampling(run, "best_of_n", config.prompts, config.samples, config.sampling, ())
    yield from _tuning(run, "best_of_n")


def _evaluation(run: Run) -> Iterator[Program]:
    config, model, mesh = run.config.evaluation, run.language_model(), run.placement.mesh
    sft_params = trained_shapes(model, run.placement)
    rewards = abstract_reward_model(run) if "reward_model" in run.config.stages else None
    policies, prompts = len(run.config.measured_policies), _evaluation_prompts(run)
    for program in _sampling(run, "eval", prompts, 1, config.sampling, (sft_params, rewards)):
        yield dataclasses.replace(program, calls=policies * program.calls)
    sequences = Arrays(run.placement).sequences(config.batch_size, run.config.policy.lengths)
    in_measure, beside = rewards, ()
    if rewards and run.config.reward_model.weights:
        in_measure, beside = None, (rewards,)
        yield _scoring(run, "eval", rewards, policies, prompts, (sft_params, sft_params))
    arguments = model, run.scalar_model(), sft_params, sft_params, in_measure, sequences, config.sampling.temperature
    calls = policies * math.ceil(prompts / config.batch_size)
    tokens = config.batch_size * _length(run)
    yield Program("eval", "measure", measure, arguments, {}, mesh, calls, tokens, beside=beside)
    compared = math.comb(len(run.config.policies), 2)
    yield from _judging(run, "eval", "judge", abstract_judge(run, run.config.judge), compared * prompts, 1)


def _evaluation_prompts(run: Run) -> int:
    """How many there are at most; 0 where only the data tell."""
    source, embedded = run.config.data.evaluation_prompts, run.config.data.embedded
    if source.kind == "embedded":
        return embedded.evaluation_combinations + embedded.evaluation_unseen_templates + embedded.red_team_evaluation
    return source.limit


def _to_decoding(model: LanguageModel, placement: Placement, rules: Rules) -> jax.stages.Wrapped:
    return to_decoding(model, placement, tuple(rules.items()))


def _resident(run: Run, **trees):
    """What of these roles is in the devices' memory while others work: all but what waits in that of the hosts."""
    return tuple(tree for role, tree in trees.items() if role not in run.config.mesh.offload)


def _length(run: Run) -> int:
    return run.config.policy.max_prompt_length + run.config.policy.max_response_length


_STAGES = {
    "sft": _sft,
    "sl_cai": functools.partial(_tuning, stage="sl_cai"),
    "label": _label,
    "reward_model": _reward_model,
    "rl": _rl,
    "preference": _preference,
    "best_of_n": _best_of_n,
    "eval": _evaluation,
}
