"""The schema of a config: typed, frozen, checked in full before any work.

Config files (`configs/*.py`) return an `ml_collections.ConfigDict` that has exactly these fields.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from rlaif_jax.data.embedded import DataConfig
from rlaif_jax.errors import UserError
from rlaif_jax.judge.score import JudgeConfig
from rlaif_jax.models.transformer import ModelConfig
from rlaif_jax.parallel.mesh import MeshConfig
from rlaif_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy, and by its shape the reference, the value network and the reward model."""

    weights: str  # "" trains from scratch; else a GGUF file, or package:NAME for the one inside a package
    model: ModelConfig  # from scratch: its shape, and the size of the tokenizer trained on the corpus
    max_prompt_length: int  # tokens, chat template included; a longer prompt is an error
    max_response_length: int  # tokens, end of sequence included


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on the demonstrations."""

    steps: int
    batch_size: int
    checkpoint_every: int  # steps
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Candidate pairs sampled from the SFT policy, for the judge to label."""

    pairs: int
    temperature: float
    sample_batch_size: int  # responses sampled at a time


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """The Bradley-Terry reward model."""

    steps: int
    batch_size: int  # pairs
    checkpoint_every: int  # steps
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """PPO against the reward model."""

    steps: int  # iterations: rollout, then `epochs` over it
    batch_size: int  # rollouts an iteration
    checkpoint_every: int  # iterations
    samples_every: int  # iterations between entries of samples.jsonl
    temperature: float  # of the rollouts, and of every log-prob
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

    temperature: float
    sample_batch_size: int  # responses sampled at a time
    bootstrap_samples: int  # resamplings behind each confidence interval
    shown_samples: int  # prompts shown side by side at the end


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int
    mesh: MeshConfig
    data: DataConfig
    policy: PolicyConfig
    judge: JudgeConfig
    sft: SFTConfig
    label: LabelConfig
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
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"config field {path} must be a tuple of strings, not {value!r}")
    if type(value) is not kind:
        raise UserError(f"config field {path} must be of type {kind.__name__}, not {type(value).__name__} ({value!r})")
    return value


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


def check(config: Config, devices: int) -> None:
    """Raises UserError for values that contradict each other, before any work is done."""
    batches = {
        "sft.batch_size": config.sft.batch_size,
        "label.sample_batch_size": config.label.sample_batch_size,
        "reward_model.batch_size": config.reward_model.batch_size,
        "rl.batch_size": config.rl.batch_size,
        "judge.batch_size": config.judge.batch_size,
        "evaluation.sample_batch_size": config.evaluation.sample_batch_size,
    }
    for name, size in batches.items():
        if size < 1 or size % devices:
            raise UserError(f"config.{name}={size} must be a positive multiple of the {devices} devices of the batch")
    if config.rl.batch_size % (config.rl.minibatches * devices):
        raise UserError(
            f"config.rl.batch_size={config.rl.batch_size} must be a multiple of rl.minibatches x devices "
            f"({config.rl.minibatches} x {devices})"
        )
    if config.label.pairs < config.reward_model.batch_size:
        raise UserError(
            f"config.label.pairs={config.label.pairs} is fewer than reward_model.batch_size="
            f"{config.reward_model.batch_size}"
        )
    positive = ("sft.steps", "reward_model.steps", "rl.steps", "rl.epochs", "label.temperature", "rl.temperature",
                "judge.shard_size", "judge.bucket", "evaluation.bootstrap_samples", "rl.samples_every")  # fmt: skip
    flat = flatten(config)
    for name in [*positive, *(name for name in flat if name.endswith("checkpoint_every"))]:
        if flat[name] <= 0:
            raise UserError(f"config.{name} must be positive, not {flat[name]}")
