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
from rlaif_jax.judge.prompts import METHODS
from rlaif_jax.judge.score import JudgeConfig
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
    checkpoint_every: int  # steps
    keep_best: str  # "", or "min METRIC" or "max METRIC": this checkpoint is kept beside the newest two
    validation_pairs: int  # labels kept from training, to measure and calibrate the rewards on
    calibrate: bool  # scale the rewards by the factor that predicts the held-out labels best
    min_evidence: float  # standard errors by which they must beat chance there, lest calibration sets them to 0
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """PPO against the reward model."""

    steps: int  # iterations: rollout, then `epochs` over it
    batch_size: int  # rollouts an iteration
    checkpoint_every: int  # iterations
    keep_best: str  # "", or "min METRIC" or "max METRIC": this checkpoint is kept beside the newest two
    samples_every: int  # iterations between entries of samples.jsonl
    sampling: SamplingConfig  # of the rollouts; its temperature is also that of every log-prob
    epochs: int  # passes over a rollout batch
    minibatches: int  # a pass
    clip_ratio: float
    clip_value: float
    gamma: float
    gae_lambda: float
    kl_coef: float  # of k1 against the SFT policy, in the reward
    missing_eos_reward: float  # the reward of a response that never ends
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
    """`config` with other values in some fields: dotted name -> value, e.g. {"rl.kl_coef": 0.02}.

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
    ("rl.kl_coef rl.clip_ratio rl.clip_value", "0 or more", lambda x: x >= 0),
    (
        "data.embedded.*_share data.max_malformed_rate judge.max_failure_rate *.noise_rate rl.gamma rl.gae_lambda "
        "*.min_p *.b1 *.b2",
        "from 0 to 1",
        lambda x: 0 <= x <= 1,
    ),
    ("seed", "from 0 to 2147483647, or -1", lambda x: 0 <= x < 2**31),
    ("mesh.replicated", f"of {', '.join(RULES)}", lambda x: all(name in RULES for name in x)),
    ("data.layout", f"one of {', '.join(LAYOUTS)}", lambda x: x in LAYOUTS),
    ("data.*.kind", f"one of {', '.join(map(repr, KINDS))}", lambda x: x in KINDS),
    ("sampler.slots", "2 or more, the candidates of a pair", lambda x: x >= 2),
    ("sft.teacher.prompt", "a text with {prompt} in it", lambda x: "{prompt}" in x),
    ("label.source", "ai, human or both", lambda x: x in ("ai", "human", "both")),
    ("preferences.order", "both, forward or reversed", lambda x: x in ("both", "forward", "reversed")),
    ("judge.prompt.method", f"one of {', '.join(METHODS)}", lambda x: x in METHODS),
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
    minibatches = config.rl.minibatches * devices
    _require(flat, "rl.batch_size", f"a multiple of rl.minibatches x devices, {minibatches}", lambda x: (
        x % minibatches == 0))  # fmt: skip
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
