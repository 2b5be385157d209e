"""The schema of a config: typed, frozen, checked in full before any work.

Config files (`configs/*.py`) return an `ml_collections.ConfigDict` that has exactly these fields.
"""

import dataclasses
import difflib
import fnmatch
import math
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from rlaif_jax.data.layouts import LAYOUTS
from rlaif_jax.data.prepare import DataConfig
from rlaif_jax.data.sources import KINDS
from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import METHODS, PromptConfig
from rlaif_jax.judge.score import JudgeConfig
from rlaif_jax.losses.kl import why_wrong
from rlaif_jax.losses.policy import AGGREGATIONS
from rlaif_jax.models.attention import IMPLEMENTATIONS
from rlaif_jax.models.transformer import ModelConfig
from rlaif_jax.parallel.mesh import RULES, MeshConfig
from rlaif_jax.sampling.continuous import SamplerConfig
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.training.optimizer import SCHEDULES, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy, and by its shape the reference, the value network and the reward model."""

    weights: str  # "" trains from scratch; else a GGUF file, or package:NAME for the one inside a package
    model: ModelConfig  # from scratch: its shape, and the size of the tokenizer trained on the corpus
    max_prompt_length: int  # tokens, chat template included; a longer prompt is shortened or dropped
    max_response_length: int  # tokens, end of sequence included


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A model that writes the demonstrations, through its chat template."""

    weights: str  # a GGUF file, or package:NAME; "" for the demonstrations of the data
    prompt: str  # what it is asked, with {prompt} in it
    demonstrations: int  # how many training prompts it replies to
    max_new_tokens: int
    dtype: str
    sampling: SamplingConfig
    sampler: SamplerConfig
    commit_every: int  # replies written down at a time


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on the demonstrations."""

    teacher: TeacherConfig

    steps: int
    batch_size: int  # rows
    row_length: int  # tokens; a row takes as many examples as fit (packing)
    packing: bool  # False: one example a row
    micro_batches: int  # parts of a batch worked on one after another, to save memory
    max_skipped_updates: int  # updates that may be left out, their loss or gradient not being finite
    checkpoint_every: int  # steps
    keep_best: str  # "", or "min METRIC" or "max METRIC": this checkpoint is kept beside the newest two
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Candidate pairs sampled from the SFT policy, for the judge to label; or comparisons that people made."""

    source: str  # "ai", "human" (data.comparisons) or "both", as many pairs of each
    pairs: int  # of each source
    audit_pairs: int  # of data.comparisons, judged as well: how far people agree, and what the labels' temperature is
    sampling: SamplingConfig
    commit_every: int  # replies written down at a time


@dataclasses.dataclass(frozen=True)
class PreferencesConfig:
    """What is learned from a label."""

    order: str  # "both" is the mean of both orders; "forward" or "reversed" one of them alone
    hard: bool  # 0 or 1, whichever is nearer
    calibrate: bool  # divide the log-odds of AI labels by the temperature that fits people's choices best
    noise_rate: float  # share of labels that are turned round


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """The Bradley-Terry reward model."""

    steps: int
    batch_size: int  # pairs
    micro_batches: int  # as in sft
    max_skipped_updates: int  # as in sft
    checkpoint_every: int  # steps
    keep_best: str  # "", or "min METRIC" or "max METRIC": this checkpoint is kept beside the newest two
    validation_pairs: int  # labels kept from training, to measure and calibrate the rewards on
    calibrate: bool  # scale the rewards by the factor that predicts the held-out labels best
    min_evidence: float  # standard errors by which they must beat chance there, lest calibration sets them to 0
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """What holds the policy near the SFT policy."""

    placement: str  # "reward" or "loss"
    estimator: str  # "k1" in the reward; "k2", "k3" or "full" (the whole vocabulary, exact) in the loss
    coef: float  # of the first iteration
    interpolate: bool  # (1 - coef) * score - coef * KL, as Lee et al. (arXiv 2309.00267, section 2.2.1)
    target: float  # nats a response, which the coefficient is adapted to; 0: it is fixed
    horizon: float  # responses that an adaptation takes


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """The score of a response: a sum of parts, each with a weight of its own; 0 leaves a part out."""

    reward_model: float
    judge: float  # its rating of the response by itself, from -1 to 1 (direct RLAIF)
    judge_prompt: PromptConfig  # of that rating, beside the model and batches of `judge`
    verifier: float
    verifier_function: str  # "ground_truth" (embedded data), or "module:function" of prompts and responses
    length: float  # what each token beyond length_limit takes away
    length_limit: int  # tokens
    format: float  # of a response that format_pattern matches
    format_pattern: str  # a regular expression that the whole response must match
    normalise: str  # "none"; by mean and deviation so far, "running"; by those of the first iteration, "reference"
    clip: float  # the normalised score is held between -clip and clip; 0: it is not
    max_unscored_rate: float  # a larger share of responses without a score stops the stage


@dataclasses.dataclass(frozen=True)
class AlarmsConfig:
    """What is said aloud when an iteration reaches it; 0 turns one off."""

    kl_above: float  # nats a response
    entropy_below: float  # nats a token
    length_below: float  # tokens a response
    clip_fraction_above: float


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Policy gradients: rollouts, an advantage of each token, a loss."""

    steps: int  # iterations: rollout, then `epochs` over it
    batch_size: int  # rollouts an iteration
    group_size: int  # consecutive rollouts that reply to one prompt
    rollout_lag: int  # 1: an iteration trains on what the policy before the last updates has sampled
    checkpoint_every: int  # iterations
    keep_best: str  # "", or "min METRIC" or "max METRIC": this checkpoint is kept beside the newest two
    samples_every: int  # iterations between entries of samples.jsonl
    sampling: SamplingConfig  # of the rollouts; its temperature is also that of every log-prob
    rewards: RewardsConfig
    penalise_missing_eos: bool  # a response that never ends gets missing_eos_reward as its score
    missing_eos_reward: float
    kl: KLConfig
    advantage: str  # "gae", or of groups "leave_one_out" (RLOO) or "group" (GRPO)
    gamma: float  # of gae; 1 with gae_lambda=1 is the return less the value
    gae_lambda: float
    group_std: bool  # "group" divides by the deviation in the group; False is Dr. GRPO
    whiten_rewards: bool  # of gae, the mean kept
    whiten_advantages: bool
    loss: str  # "clipped" (PPO) or "reinforce"
    clip_low: float  # the ratio is held above 1 - clip_low
    clip_high: float  # and below 1 + clip_high
    dual_clip: float  # bounds the loss of tokens with negative advantage, e.g. 3.0; 0: it does not
    aggregation: str  # of tokens: "token_mean", "sequence_mean" or "sequence_sum", see losses/policy.py
    importance_cap: float  # truncated importance weights of old over sampler; 0: none
    ptx_coef: float  # of the log-likelihood of demonstrations, as PPO-ptx
    ptx_rows: int  # of demonstrations, beside each minibatch
    epochs: int  # passes over a rollout batch
    minibatches: int  # a pass
    micro_batches: int  # as in sft, of a minibatch
    max_skipped_updates: int  # as in sft
    value_init: str  # the value network of gae begins as "reward_model" or as "sft" with a new head
    clip_value: float  # 0: none
    alarms: AlarmsConfig
    optimizer: OptimizerConfig
    value_optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out prompts."""

    sampling: SamplingConfig
    commit_every: int  # replies written down at a time
    batch_size: int  # responses scored at a time
    bootstrap_samples: int  # resamplings behind each confidence interval
    shown_samples: int  # prompts shown side by side at the end


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int  # -1 draws one, prints it and saves it in config.json
    stages: tuple[str, ...]  # of those in stages/pipeline.py, in that order
    mesh: MeshConfig
    data: DataConfig
    policy: PolicyConfig
    sampler: SamplerConfig
    judge: JudgeConfig
    sft: SFTConfig
    label: LabelConfig
    preferences: PreferencesConfig
    reward_model: RewardModelConfig
    rl: RLConfig
    evaluation: EvaluationConfig


def parse(values: Mapping[str, Any], schema: type = Config, path: str = "config") -> Any:
    """The dataclass `schema` from nested mappings.

    Raises UserError that names the first field that is unknown (with the nearest valid name), missing or of the
    wrong type.
    """
    fields = typing.get_type_hints(schema)
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {path}.{near[0]}?" if near else f"known fields: {', '.join(fields)}"
            raise UserError(f"unknown config field {path}.{name}: {hint}")
    parsed = {}
    for field in dataclasses.fields(schema):
        if field.name in values:
            parsed[field.name] = _value(values[field.name], fields[field.name], f"{path}.{field.name}")
        elif field.default is dataclasses.MISSING:
            raise UserError(f"config field {path}.{field.name} is missing")
    return schema(**parsed)


def _value(value: Any, kind: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"config field {path} must be a group of fields, not {value!r}")
        return parse(value, kind, path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is Mapping:
        if isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values()):
            return dict(value)
        raise UserError(f"config field {path} must map names to names, not {value!r}")
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        if isinstance(value, (tuple, list)) and all(type(item) is item_kind for item in value):
            return tuple(value)
        raise UserError(f"config field {path} must be a tuple of {item_kind.__name__}, not {value!r}")
    if kind is float and type(value) is float and not math.isfinite(value):
        raise UserError(f"config field {path} must be finite, not {value!r}")
    if type(value) is not kind:
        raise UserError(f"config field {path} must be of type {kind.__name__}, not {type(value).__name__} ({value!r})")
    return value


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other values in some fields: dotted name -> value, e.g. {"rl.kl.coef": 0.02}.

    Raises UserError for a field that does not exist (with the nearest one that does) or of the wrong type.
    """
    values, known = dataclasses.asdict(config), flatten(config)
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see rlaif_jax/config.py for the fields"
            raise UserError(f"unknown config field {name}: {hint}")
        *groups, field = name.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[field] = value
    return parse(values)


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """A config dataclass as a flat mapping from dotted names to values, as JSON would hold them."""
    flat = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


STAGES = ("sft", "label", "reward_model", "rl", "eval")


_NEEDS = {"label": "sft", "reward_model": "label", "rl": "sft", "eval": "rl"}  # whose results a stage reads


def _in_order(names: tuple[str, ...]) -> bool:
    return bool(names) and list(names) == sorted(set(names) & set(STAGES), key=STAGES.index)


_DTYPES = ("float32", "bfloat16", "float16")
_CACHE_DTYPES = (*_DTYPES, "int8")
# Patterns of fields, what their values must be, and the test of it.
_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("*.steps *.checkpoint_every *.max_grad_norm *.samples_every *.epochs *.minibatches", "positive", lambda x: x > 0),
    (
        "label.pairs *.teacher.demonstrations rl.sampling.temperature *.bootstrap_samples *.slots *.refill *.chunk",
        "positive",
        lambda x: x > 0,
    ),
    (
        "data.embedded.train_prompts *.demonstrations_per_prompt *.evaluation_combinations sft.row_length",
        "positive",
        lambda x: x > 0,
    ),
    (
        "policy.max_*_length *.commit_every judge.shard_size judge.batch_tokens judge.pairs_per_tree",
        "positive",
        lambda x: x > 0,
    ),
    ("*.buckets *.prompt_buckets *.bucket_multiple *.max_new_tokens *.samples", "positive", lambda x: x > 0),
    ("*.temperature *.top_k", "0 or more", lambda x: x >= 0),
    ("*.top_p", "above 0, at most 1", lambda x: 0 < x <= 1),
    (
        "*.evaluation_unseen_templates data.*.limit *.validation_pairs *.shown_samples *.audit_pairs *.shots",
        "0 or more",
        lambda x: x >= 0,
    ),
    ("*.min_evidence *.learning_rate *.warmup_steps *.weight_decay *.eps", "0 or more", lambda x: x >= 0),
    (
        "rl.kl.coef rl.kl.target rl.clip* rl.dual_clip rl.importance_cap rl.ptx_* rl.alarms.*",
        "0 or more",
        lambda x: x >= 0,
    ),
    ("*.max_skipped_updates rl.rewards.clip rl.rewards.length_limit", "0 or more", lambda x: x >= 0),
    ("*.micro_batches rl.group_size rl.kl.horizon", "positive", lambda x: x > 0),
    ("rl.rollout_lag", "0 or 1", lambda x: x in (0, 1)),
    ("rl.kl.placement", "reward or loss", lambda x: x in ("reward", "loss")),
    ("rl.kl.estimator", "k1, k2, k3 or full", lambda x: x in ("k1", "k2", "k3", "full")),
    ("rl.advantage", "gae, leave_one_out or group", lambda x: x in ("gae", "leave_one_out", "group")),
    ("rl.loss", "clipped or reinforce", lambda x: x in ("clipped", "reinforce")),
    ("rl.aggregation", f"one of {', '.join(AGGREGATIONS)}", lambda x: x in AGGREGATIONS),
    ("rl.value_init", "reward_model or sft", lambda x: x in ("reward_model", "sft")),
    ("rl.rewards.normalise", "none, running or reference", lambda x: x in ("none", "running", "reference")),
    (
        "data.embedded.*_share data.max_malformed_rate judge.max_failure_rate *.noise_rate rl.gamma rl.gae_lambda "
        "rl.rewards.max_unscored_rate "
        "*.min_p *.b1 *.b2",
        "from 0 to 1",
        lambda x: 0 <= x <= 1,
    ),
    ("stages", f"some of {', '.join(STAGES)}, in this order", _in_order),
    ("seed", "from 0 to 2147483647, or -1", lambda x: 0 <= x < 2**31),
    ("mesh.replicated", f"of {', '.join(RULES)}", lambda x: all(name in RULES for name in x)),
    ("data.layout", f"one of {', '.join(LAYOUTS)}", lambda x: x in LAYOUTS),
    ("data.*.kind", f"one of {', '.join(map(repr, KINDS))}", lambda x: x in KINDS),
    ("sampler.slots", "2 or more, the candidates of a pair", lambda x: x >= 2),
    ("sft.teacher.prompt", "a text with {prompt} in it", lambda x: "{prompt}" in x),
    ("label.source", "ai, human or both", lambda x: x in ("ai", "human", "both")),
    ("preferences.order", "both, forward or reversed", lambda x: x in ("both", "forward", "reversed")),
    ("judge.prompt.method rl.rewards.judge_prompt.method", f"one of {', '.join(METHODS)}", lambda x: x in METHODS),
    ("*.schedule", f"one of {', '.join(SCHEDULES)}", lambda x: x in SCHEDULES),
    ("*.keep_best", '"", "min METRIC" or "max METRIC"', lambda x: re.fullmatch(r"((min|max) \S+)?", x) is not None),
    ("*.attention", f"one of {', '.join(IMPLEMENTATIONS)}", lambda x: x in IMPLEMENTATIONS),
    ("*.cache_dtype", f'"" or one of {", ".join(_CACHE_DTYPES)}', lambda x: x in ("", *_CACHE_DTYPES)),
    ("*.dtype", f"one of {', '.join(_DTYPES)}", lambda x: x in _DTYPES),
)
_BATCHES = "*.batch_size *.slots"


def check(config: Config, devices: int) -> None:
    """Raises UserError for values that are out of range or contradict each other, before any work is done.

    devices: over how many a batch is split.
    """
    flat = flatten(config)
    for patterns, what, holds in _RANGES:
        _require(flat, patterns, what, holds)
    devices_message = f"a positive multiple of the {devices} devices of the batch"
    _require(flat, _BATCHES, devices_message, lambda x: x > 0 and x % devices == 0)
    for name in ("sft", "reward_model"):
        parts = getattr(config, name).micro_batches * devices
        _require(flat, f"{name}.batch_size", f"a multiple of {name}.micro_batches x devices, {parts}", lambda x: (
            x % parts == 0))  # fmt: skip  # noqa: B023
    for name in config.stages:
        if name in _NEEDS and _NEEDS[name] not in config.stages:
            raise UserError(f"config.stages={','.join(config.stages)}: {name} needs {_NEEDS[name]}")
    _check_rl(config, flat, devices)
    needed = config.reward_model.batch_size + config.reward_model.validation_pairs
    _require(flat, "label.pairs", f"at least reward_model.batch_size + validation_pairs, {needed}", lambda x: (
        x >= needed))  # fmt: skip
    longest = config.policy.max_prompt_length + config.policy.max_response_length
    _require(flat, "sft.row_length", f"at least max_prompt_length + max_response_length of the policy, {longest}", (
        lambda x: x >= longest))  # fmt: skip
    needed_sets = ["demonstrations", "train_prompts", "evaluation_prompts"]
    needed_sets += ["comparisons"] if config.label.source != "ai" or config.label.audit_pairs else []
    for name in needed_sets:
        _require(flat, f"data.{name}.kind", "set", bool)
    if config.preferences.calibrate and not config.label.audit_pairs:
        raise UserError("config.preferences.calibrate=True needs label.audit_pairs of people to calibrate on")
    if config.preferences.order != "both" and config.judge.prompt.method == "rating":
        raise UserError("config.preferences.order must be both where judge.prompt.method=rating: there are no orders")
    rationale = config.judge.rationale
    if rationale.samples > 1 and rationale.sampling.temperature == 0:
        raise UserError(
            f"config.judge.rationale.samples={rationale.samples} would all be the same at "
            "judge.rationale.sampling.temperature=0"
        )
    if config.judge.rationale.samples > config.judge.rationale.sampler.slots:
        raise UserError(
            f"config.judge.rationale.samples={config.judge.rationale.samples} must be at most its sampler.slots, "
            f"{config.judge.rationale.sampler.slots}"
        )
    if config.reward_model.calibrate and not config.reward_model.validation_pairs:
        raise UserError("config.reward_model.calibrate=True needs reward_model.validation_pairs to calibrate on")


def _check_rl(config: Config, flat: Mapping[str, Any], devices: int) -> None:
    rl, stages = config.rl, config.stages
    parts = rl.minibatches * rl.micro_batches * devices
    _require(flat, "rl.batch_size", f"a multiple of rl.minibatches x rl.micro_batches x devices, {parts}", lambda x: (
        x % parts == 0))  # fmt: skip
    prompts = rl.group_size * devices
    _require(flat, "rl.batch_size", f"a multiple of rl.group_size x devices, {prompts}", lambda x: x % prompts == 0)
    if reason := why_wrong(rl.kl.placement, rl.kl.estimator):
        raise UserError(f"config.rl.kl: estimator={rl.kl.estimator} with placement={rl.kl.placement}: {reason}")
    if rl.kl.coef > 1 and rl.kl.interpolate:
        raise UserError(f"config.rl.kl.coef={rl.kl.coef} must be at most 1 where rl.kl.interpolate=True")
    if rl.kl.target:
        _require(flat, "rl.kl.coef", "above 0 with rl.kl.target, for it is adapted by factors", lambda x: x > 0)
        _require(flat, "rl.kl.horizon", f"at least rl.batch_size, {rl.batch_size}", lambda x: x >= rl.batch_size)
        if rl.kl.interpolate:
            raise UserError(
                "config.rl.kl.target with rl.kl.interpolate=True: a coefficient that grows beyond 1 would turn the "
                "score round; set one of them to 0 or False"
            )
    if rl.advantage != "gae" and rl.group_size < 2:
        raise UserError(f"config.rl.advantage={rl.advantage} needs rl.group_size of 2 or more, to compare replies")
    if rl.loss == "reinforce" and rl.epochs * rl.minibatches > 1:
        raise UserError(
            "config.rl.loss=reinforce is right for one update on each rollout: set rl.epochs=1 and rl.minibatches=1, "
            "or take rl.loss=clipped"
        )
    if rl.ptx_coef:
        rows = rl.micro_batches * devices
        _require(flat, "rl.ptx_rows", f"a positive multiple of rl.micro_batches x devices, {rows}, with rl.ptx_coef", (
            lambda x: x > 0 and x % rows == 0))  # fmt: skip
    rewards = rl.rewards
    if "rl" in stages and not any((rewards.reward_model, rewards.judge, rewards.verifier, rewards.length, (
            rewards.format))):  # fmt: skip
        raise UserError("config.rl.rewards has no part with a weight, so there is nothing to learn")
    if "rl" in stages and "reward_model" not in stages:
        if rewards.reward_model:
            raise UserError("config.rl.rewards.reward_model needs the stage reward_model in config.stages")
        if rl.advantage == "gae" and rl.value_init == "reward_model":
            raise UserError("config.rl.value_init=reward_model needs the stage reward_model in config.stages")
    if rewards.judge and (rewards.judge_prompt.method != "rating" or rewards.judge_prompt.chain_of_thought):
        raise UserError(
            "config.rl.rewards.judge needs rl.rewards.judge_prompt.method=rating without chain_of_thought: each "
            "response is rated by itself"
        )
    if rewards.verifier and not rewards.verifier_function:
        raise UserError("config.rl.rewards.verifier needs rl.rewards.verifier_function")
    try:
        re.compile(rewards.format_pattern)
    except re.error as error:
        raise UserError(f"config.rl.rewards.format_pattern={rewards.format_pattern!r} is malformed: {error}") from error


def check_decoder(model: ModelConfig, prompt_and_response: int) -> None:
    """Raises UserError for a decoder that can't be built, or that is too short for what it is to read (in tokens)."""
    flat = {f"policy.model.{name}": value for name, value in dataclasses.asdict(model).items()}
    sizes = " ".join(name for name, value in flat.items() if type(value) in (int, float))
    _require(flat, sizes, "positive", lambda x: x > 0)
    kv_heads = model.num_key_value_heads
    _require(flat, "*.num_attention_heads", f"a multiple of num_key_value_heads, {kv_heads}", lambda x: (
        x % kv_heads == 0))  # fmt: skip
    _require(flat, "*.head_dim", "even", lambda x: x % 2 == 0)
    _require(flat, "*.max_position_embeddings", f"at least max_prompt_length + max_response_length of the policy, "
             f"{prompt_and_response}", lambda x: x >= prompt_and_response)  # fmt: skip


def _require(flat: Mapping[str, Any], patterns: str, what: str, holds: Callable[[Any], bool]) -> None:
    for pattern in patterns.split():
        for name in fnmatch.filter(flat, pattern):
            if not holds(flat[name]):
                raise UserError(f"config.{name}={flat[name]!r} must be {what}")
