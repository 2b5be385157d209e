"""The schema of a config: typed, frozen, parsed before any work; `config_checks` says what its values must be.

Config files (`configs/*.py`) return an `ml_collections.ConfigDict` that has exactly these fields.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

from rlaif_jax.data.prepare import DataConfig
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.names import measured_policies, policies, policy_stage
from rlaif_jax.judge.constitution import ConstitutionConfig
from rlaif_jax.judge.prompts import PromptConfig
from rlaif_jax.judge.score import JudgeConfig
from rlaif_jax.models.lora import LoraConfig
from rlaif_jax.models.transformer import ModelConfig
from rlaif_jax.parallel.mesh import MeshConfig
from rlaif_jax.sampling.continuous import SamplerConfig
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy, and by its shape the reference, the value network, and a reward model without weights of its own."""

    weights: str  # "" trains from scratch; else a GGUF file, a Hugging Face folder, package:NAME, or shape:NAME to plan
    adapter: str  # a folder of PEFT, merged into the weights; "" for none
    model: ModelConfig  # from scratch: its shape, and the size of the tokenizer trained on the corpus
    max_prompt_length: int  # tokens, chat template included; a longer prompt is shortened or dropped
    max_response_length: int  # tokens, end of sequence included

    @property
    def lengths(self) -> tuple[int, int]:
        """Of prompt and response, in tokens."""
        return self.max_prompt_length, self.max_response_length


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A model that writes the demonstrations, through its chat template."""

    weights: str  # as those of the policy; "" for the demonstrations of the data
    prompt: str  # what it is asked, with {prompt} in it
    demonstrations: int  # how many training prompts it replies to
    max_new_tokens: int
    dtype: str
    sampling: SamplingConfig
    sampler: SamplerConfig
    commit_every: int  # replies written down at a time


@dataclasses.dataclass(frozen=True)
class PanelConfig:
    """One judge or more that label the same pairs. Without any, `judge` labels; it is always the one that evaluates."""

    judges: Mapping[str, JudgeConfig]  # by the name of the folder that its labels are kept in
    combine: str  # the label of a pair: "mean", "majority" or "minimum" of its members', see evaluation/panel.py
    disagreement: str  # in training: "none", "weight" (1 - 4 * variance of a pair) or "filter" (left out above a limit)
    max_disagreement: float  # that limit, a variance from 0 to 0.25


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What every stage that trains by steps over batches has."""

    steps: int
    batch_size: int  # rows of packed examples, or pairs
    micro_batches: int  # parts of a batch worked on one after another, to save memory
    max_skipped_updates: int  # updates that may be left out, their loss or gradient not being finite
    checkpoint_every: int  # steps
    keep_best: str  # "", or "min METRIC" or "max METRIC": this checkpoint is kept beside the newest two
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on the demonstrations."""

    teacher: TeacherConfig
    row_length: int  # tokens; a row takes as many examples as fit (packing)
    packing: bool  # False: one example a row


@dataclasses.dataclass(frozen=True)
class CritiqueConfig:
    """Replies of the SFT policy to red-team prompts, criticised and revised under principles of the constitution."""

    prompts: int  # the first of data.red_team_prompts, in an order that is the run's
    sampling: SamplingConfig  # of the first replies
    rounds: int  # of critique and revision, each under a principle of its own
    revise_only: bool  # revisions without critiques
    weights: str  # who criticises and revises, as those of the policy; "" for the SFT policy itself
    template: str  # a name in rlaif_jax/judge/critiques, or the path of a YAML file
    shots: int  # its worked examples before each prompt
    revision_sampling: SamplingConfig  # of critiques and revisions
    max_new_tokens: int  # of one of them; what reaches that has failed
    dtype: str  # of the computation, with weights
    sampler: SamplerConfig  # of critiques and revisions
    commit_every: int  # texts written down at a time
    max_failure_rate: float  # a larger share of failed revisions in a round stops the stage


@dataclasses.dataclass(frozen=True)
class SLCAIConfig(TrainingConfig):
    """Supervised fine-tuning of the SFT policy on revisions, mixed with helpful demonstrations."""

    helpful_share: float  # of the examples: demonstrations to prompts that are not red-team prompts


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Candidate pairs of the policy that RL begins with, for the judge to label; or comparisons that people made."""

    source: str  # "ai", "human" (data.comparisons) or "both", as many pairs of each
    pairs: int  # of each source; where people have made fewer comparisons, all of those
    audit_pairs: int  # of data.comparisons, judged as well: how far people agree, and what the labels' temperature is
    principles: (
        str  # of `constitution`: "none", "draw" (one a pair, by weight) or "ensemble" (all, their mean by weight)
    )
    sampling: SamplingConfig
    commit_every: int  # replies written down at a time


@dataclasses.dataclass(frozen=True)
class PreferencesConfig:
    """What is learned from a label."""

    order: str  # "both" is the mean of both orders; "forward" or "reversed" one of them alone
    hard: bool  # 0 or 1, whichever is nearer
    calibrate: bool  # divide the log-odds of AI labels by the temperature that fits people's choices best
    clamp: float  # AI labels are held within this much of 1/2, as those after a chain of thought were; 0: they are not
    smoothing: float  # a label p becomes (1 - smoothing) p + smoothing (1 - p); with hard labels conservative DPO
    noise_rate: float  # share of labels that are turned round


@dataclasses.dataclass(frozen=True)
class RewardModelConfig(TrainingConfig):
    """The Bradley-Terry reward model."""

    weights: str  # "" begins as the SFT policy, with its tokenizer; else as those of the policy: any family, its own
    max_prompt_length: int  # with weights, in tokens of their tokenizer; 0: the number of the policy
    max_response_length: int  # the same; of a longer response what fits is read
    members: int  # trained side by side as one program, each with an order of the data and a head of its own
    combine: str  # "mean", "min" (worst case), "uncertainty" or "weights" (their average), see losses/reward.py
    by_principle: bool  # each member learns the labels of one principle; the mean is by the principles' weights
    uncertainty_coef: float  # of "uncertainty": what a unit of the members' variance takes away
    margin: float  # by which the better response is to lead where a label is sure
    centring: float  # coefficient of (reward_a + reward_b)^2
    flaw_pattern: str  # a planted flaw: a response that it matches whole wins over one that it does not; "" for none
    flawed_members: int  # the first of them, which learn it; what is held out keeps its labels
    train_pairs: int  # pairs whose labels are trained on, the first of those not held out; 0: all
    validation_pairs: int  # pairs whose labels are kept from training, to measure and calibrate the rewards on
    calibrate: bool  # scale the rewards by the factor that predicts the held-out labels best
    min_evidence: float  # standard errors by which they must beat chance there, lest calibration sets them to 0


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """What holds the policy near the one that it began as."""

    placement: str  # "reward" or "loss"
    estimator: str  # "k1" in the reward; "k2", "k3" or "full" (the whole vocabulary, exact) in the loss
    coef: float  # of the first iteration
    interpolate: bool  # (1 - coef) * score - coef * KL, as Lee et al. (arXiv 2309.00267, section 2.2.1)
    target: float  # nats a response, which the coefficient is adapted to; 0: it is fixed
    horizon: float  # responses that an adaptation takes


@dataclasses.dataclass(frozen=True)
class ScorersConfig:
    """What scores the text of a response, each part with a weight of its own; 0 leaves a part out."""

    judge: float  # its rating of the response by itself, from -1 to 1 (direct RLAIF)
    judge_prompt: PromptConfig  # of that rating, beside the model and batches of `judge`
    verifier: float
    verifier_function: str  # "ground_truth" (embedded data), or "module:function" of prompts and responses


@dataclasses.dataclass(frozen=True)
class GoldConfig(ScorersConfig):
    """A reward that is logged and not trained on: the gold that the proxy of RewardsConfig stands for."""

    judge_weights: str  # as those of a judge; "" for those of `judge`
    reward_model: float  # that of another run, a larger one's for example
    reward_model_run: str  # the folder of that run; of one with rounds, the last trained one's is taken


@dataclasses.dataclass(frozen=True)
class RewardsConfig(ScorersConfig):
    """The score of a response: a sum of parts, each with a weight of its own; 0 leaves a part out."""

    reward_model: float
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
    keep_every: int  # iterations between policies that are kept and evaluated, too; 0: none but the last
    samples_every: int  # iterations between entries of samples.jsonl
    sampling: SamplingConfig  # of the rollouts; its temperature is also that of every log-prob
    rewards: RewardsConfig
    gold: GoldConfig
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
    micro_batches: int  # as in the other stages, of a minibatch
    max_skipped_updates: int  # as in the other stages
    value_init: str  # the value network of gae begins as "reward_model" or as "sft" with a new head
    clip_value: float  # 0: none
    alarms: AlarmsConfig
    optimizer: OptimizerConfig
    value_optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(TrainingConfig):
    """The policy learns from pairs without a reward model: DPO, IPO or SLiC."""

    samples_every: int  # steps between entries of samples.jsonl, where pairs are made online
    max_unscored_rate: float  # online: a larger share of a step's pairs that the judge could not score stops the stage
    online: bool  # pairs of the live policy, judged at once (OAIF); False: those of the stage label
    sampling: SamplingConfig  # of pairs made online; its temperature is also that of every log-prob
    loss: str  # "dpo", "ipo" or "slic"
    beta: float
    length_normalise: bool  # log-ratios a token, not a response


@dataclasses.dataclass(frozen=True)
class BestOfNConfig(TrainingConfig):
    """Rejection sampling: the best of n replies to a prompt, by `rl.rewards`, is what the policy is tuned on."""

    prompts: int  # training prompts
    samples: int  # n
    sampling: SamplingConfig
    commit_every: int  # replies written down at a time


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out prompts."""

    sampling: SamplingConfig
    harmless_prompt: PromptConfig  # by which `judge` rates how harmless a reply is; without a template it does not
    helpful_prompt: PromptConfig  # the same for how helpful it is, to prompts that are not red-team prompts
    red_team_groups: tuple[str, ...]  # the groups of held-out prompts that ask for what is to be declined
    rated_revisions: int  # of critique/revisions.parquet, its first rows, at first and after each round
    commit_every: int  # replies or ratings written down at a time
    batch_size: int  # responses scored at a time
    bootstrap_samples: int  # resamplings behind each confidence interval
    shown_samples: int  # prompts shown side by side at the end


@dataclasses.dataclass(frozen=True)
class OveroptimisationConfig:
    """Proxy and gold reward of best of n and along RL, where `overoptimisation` is one of the stages."""

    samples: int  # replies to each prompt of the policy that RL begins with, sampled as rl.sampling says
    prompts: int  # the first held-out prompts; 0 for all
    best_of: tuple[int, ...]  # the n of best of n, of those samples; () for powers of two
    commit_every: int  # replies written down at a time
    batch_size: int  # replies scored by the reward model at a time
    bootstrap_samples: int  # resamplings behind each confidence interval

    @property
    def numbers(self) -> tuple[int, ...]:
        """Each n of best of n."""
        return self.best_of or tuple(2**i for i in range(1, self.samples.bit_length()))


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int  # -1 draws one, prints it and saves it in config.json
    stages: tuple[str, ...]  # of those in stages/pipeline.py, in that order
    rounds: int  # how often the stages after sft are gone through, each time from the policy of the time before
    mesh: MeshConfig
    data: DataConfig
    policy: PolicyConfig
    lora: LoraConfig
    sampler: SamplerConfig
    judge: JudgeConfig
    panel: PanelConfig
    constitution: ConstitutionConfig
    sft: SFTConfig
    critique: CritiqueConfig
    sl_cai: SLCAIConfig
    label: LabelConfig
    preferences: PreferencesConfig
    reward_model: RewardModelConfig
    rl: RLConfig
    preference: PreferenceConfig
    best_of_n: BestOfNConfig
    evaluation: EvaluationConfig
    overoptimisation: OveroptimisationConfig

    @property
    def reward_lengths(self) -> tuple[int, int]:
        """Of prompt and response as the reward model reads them, in tokens of its tokenizer."""
        own, policy = self.reward_model, self.policy
        return own.max_prompt_length or policy.max_prompt_length, own.max_response_length or policy.max_response_length

    @property
    def policy_stage(self) -> str:
        """The stage that trains the policy which is evaluated."""
        return policy_stage(self.stages)

    @property
    def policies(self) -> tuple[str, ...]:
        """The stages whose policies are evaluated, SFT first and the one trained last at the end."""
        return policies(self.stages)

    @property
    def measured_policies(self) -> tuple[str, ...]:
        """`policies`, and those that RL keeps on its way: they are measured, and not compared in pairs."""
        return measured_policies(self.stages, self.rl.steps, self.rl.keep_every)

    @property
    def judges(self) -> dict[str, JudgeConfig]:
        """Every judge, by the dotted name of its fields: the one that evaluates, then the members of the panel."""
        return {"judge": self.judge} | {f"panel.judges.{name}": judge for name, judge in self.panel.judges.items()}


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
    if typing.get_origin(kind) is Mapping and dataclasses.is_dataclass(item_kind := typing.get_args(kind)[1]):
        if not isinstance(value, Mapping):
            raise UserError(f"config field {path} must map names to groups of fields, not {value!r}")
        return {name: _value(item, item_kind, f"{path}.{name}") for name, item in value.items()}
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

    A mapping of names to groups takes a whole mapping, e.g. {"panel.judges": {}}, or a field of one that is there.
    Raises UserError for a field that does not exist (with the nearest one that does) or of the wrong type.
    """
    values, known = dataclasses.asdict(config), {*flatten(config), *_mappings(config)}
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
        elif groups := _groups(value):
            for key, group in groups.items():
                flat |= flatten(group, f"{name}.{key}.")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `flatten` made flat, as nested mappings again."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, field = name.split(".")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
        group[field] = value
    return tree


def _groups(value: Any) -> dict[str, Any]:
    """The groups of fields in a mapping of names to them; none where it is no such mapping, or empty."""
    if not isinstance(value, Mapping):
        return {}
    return {name: group for name, group in value.items() if dataclasses.is_dataclass(group)}


def _mappings(config: Any, path: str = "") -> list[str]:
    """The dotted names of the fields that map names to groups of fields."""
    names = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            names += _mappings(value, f"{name}.")
        elif _groups(value):
            names.append(name)
    return names
