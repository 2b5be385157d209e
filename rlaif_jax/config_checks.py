"""Whether a config's values are in range and fit together, all of it before any work."""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from rlaif_jax.config import Config, ScorersConfig, flatten
from rlaif_jax.data.layouts import LAYOUTS
from rlaif_jax.data.sources import KINDS
from rlaif_jax.errors import UserError, blame
from rlaif_jax.evaluation.names import POLICY_STAGES
from rlaif_jax.evaluation.panel import RULES as RULES_OF_PANELS
from rlaif_jax.judge.constitution import load_constitution, select, tagged
from rlaif_jax.judge.prompts import METHODS, load_template
from rlaif_jax.judge.score import POLICY
from rlaif_jax.losses.kl import why_wrong
from rlaif_jax.losses.policy import AGGREGATIONS
from rlaif_jax.losses.preference import LOSSES as PREFERENCE_LOSSES
from rlaif_jax.losses.reward import COMBINATIONS
from rlaif_jax.models.attention import IMPLEMENTATIONS
from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.lora import TARGETS
from rlaif_jax.models.transformer import REMAT, ModelConfig
from rlaif_jax.parallel.mesh import OFFLOADED, RULES, batch_ways
from rlaif_jax.training.optimizer import MOMENT_DTYPES, SCHEDULES

STAGES = ("sft", "critique", "sl_cai", "label", "reward_model", *POLICY_STAGES, "eval", "overoptimisation")
LORA_STAGES = ("sft", "sl_cai", "reward_model", *POLICY_STAGES)  # that train a model
# Whose results a stage reads, besides what depends on other fields.
_NEEDS = {"label": "sft", "reward_model": "label", "best_of_n": "sft", "preference": "sft", "rl": "sft", "eval": "sft"}
_NEEDS |= {"overoptimisation": "rl", "critique": "sft", "sl_cai": "critique"}


def _in_order(names: tuple[str, ...]) -> bool:
    return bool(names) and list(names) == sorted(set(names) & set(STAGES), key=STAGES.index)


_DTYPES = ("float32", "bfloat16", "float16")
_CACHE_DTYPES = (*_DTYPES, "int8")
# Patterns of fields, what their values must be, and the test of it.
_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("*.steps *.checkpoint_every *.max_grad_norm *.samples_every *.epochs *.minibatches", "positive", lambda x: x > 0),
    (
        "label.pairs *.teacher.demonstrations critique.prompts critique.rounds rl.sampling.temperature "
        "*.bootstrap_samples *.slots *.refill *.chunk",
        "positive",
        lambda x: x > 0,
    ),
    (
        "data.embedded.train_prompts *.demonstrations_per_prompt *.evaluation_combinations sft.row_length",
        "positive",
        lambda x: x > 0,
    ),
    (
        "policy.max_*_length *.commit_every *.shard_size *.batch_tokens *.pairs_per_tree",
        "positive",
        lambda x: x > 0,
    ),
    ("*.buckets *.prompt_buckets *.bucket_multiple *.max_new_tokens *.samples", "positive", lambda x: x > 0),
    ("*.temperature *.top_k", "0 or more", lambda x: x >= 0),
    ("*.top_p", "above 0, at most 1", lambda x: 0 < x <= 1),
    (
        "*.evaluation_unseen_templates data.*.limit *.validation_pairs *.shown_samples *.audit_pairs *.shots "
        "overoptimisation.prompts data.embedded.red_team data.embedded.red_team_evaluation evaluation.rated_revisions "
        "*.keep_every",
        "0 or more",
        lambda x: x >= 0,
    ),
    ("*.min_evidence *.learning_rate *.warmup_steps *.weight_decay *.eps", "0 or more", lambda x: x >= 0),
    (
        "rl.kl.coef rl.kl.target rl.clip_high rl.clip_value rl.importance_cap rl.ptx_* rl.alarms.*",
        "0 or more",
        lambda x: x >= 0,
    ),
    ("rl.dual_clip", "0 (none) or above 1", lambda x: x == 0 or x > 1),
    ("*.max_skipped_updates rl.rewards.clip rl.rewards.length_limit", "0 or more", lambda x: x >= 0),
    ("rounds", "positive", lambda x: x > 0),
    ("*.micro_batches rl.group_size rl.kl.horizon preference.beta best_of_n.prompts", "positive", lambda x: x > 0),
    ("best_of_n.samples", "2 or more, to choose from", lambda x: x >= 2),
    ("preference.loss", f"one of {', '.join(PREFERENCE_LOSSES)}", lambda x: x in PREFERENCE_LOSSES),
    ("preference.sampling.temperature", "positive", lambda x: x > 0),
    ("preferences.smoothing preferences.clamp", "from 0 to below 0.5", lambda x: 0 <= x < 0.5),
    ("reward_model.combine", f"one of {', '.join(COMBINATIONS)}", lambda x: x in COMBINATIONS),
    ("reward_model.members", "positive", lambda x: x > 0),
    ("reward_model.max_*_length", "0 (as the policy's) or more", lambda x: x >= 0),
    (
        "reward_model.uncertainty_coef reward_model.margin reward_model.centring reward_model.train_pairs "
        "reward_model.flawed_members",
        "0 or more",
        (lambda x: x >= 0),
    ),
    ("rl.rollout_lag", "0 or 1", lambda x: x in (0, 1)),
    ("rl.kl.placement", "reward or loss", lambda x: x in ("reward", "loss")),
    ("rl.kl.estimator", "k1, k2, k3 or full", lambda x: x in ("k1", "k2", "k3", "full")),
    ("rl.advantage", "gae, leave_one_out or group", lambda x: x in ("gae", "leave_one_out", "group")),
    ("rl.loss", "clipped or reinforce", lambda x: x in ("clipped", "reinforce")),
    ("rl.aggregation", f"one of {', '.join(AGGREGATIONS)}", lambda x: x in AGGREGATIONS),
    ("rl.value_init", "reward_model or sft", lambda x: x in ("reward_model", "sft")),
    ("rl.rewards.normalise", "none, running or reference", lambda x: x in ("none", "running", "reference")),
    (
        "data.embedded.*_share data.max_malformed_rate *.max_failure_rate *.noise_rate rl.gamma rl.gae_lambda "
        "rl.clip_low *.min_p *.b1 *.b2",
        "from 0 to 1",
        lambda x: 0 <= x <= 1,
    ),
    ("*.max_unscored_rate sl_cai.helpful_share", "from 0 to below 1", lambda x: 0 <= x < 1),
    ("stages", f"some of {', '.join(STAGES)}, in this order", _in_order),
    ("seed", "from 0 to 2147483647, or -1", lambda x: 0 <= x < 2**31),
    ("mesh.judge.spans", "process or all", lambda x: x in ("process", "all")),
    ("mesh.offload", f"of {', '.join(OFFLOADED)}", lambda x: all(name in OFFLOADED for name in x)),
    ("mesh.replicated mesh.judge.replicated", f"of {', '.join(RULES)}", lambda x: all(name in RULES for name in x)),
    ("data.layout", f"one of {', '.join(LAYOUTS)}", lambda x: x in LAYOUTS),
    ("data.*.kind", f"one of {', '.join(map(repr, KINDS))}", lambda x: x in KINDS),
    ("sampler.slots", "2 or more, the candidates of a pair", lambda x: x >= 2),
    ("sft.teacher.prompt", "a text with {prompt} in it", lambda x: "{prompt}" in x),
    ("label.source", "ai, human or both", lambda x: x in ("ai", "human", "both")),
    ("label.principles", "none, draw or ensemble", lambda x: x in ("none", "draw", "ensemble")),
    ("preferences.order", "both, forward or reversed", lambda x: x in ("both", "forward", "reversed")),
    ("*.method", f"one of {', '.join(METHODS)}", lambda x: x in METHODS),
    ("panel.combine", f"one of {', '.join(RULES_OF_PANELS)}", lambda x: x in RULES_OF_PANELS),
    ("panel.disagreement", "none, weight or filter", lambda x: x in ("none", "weight", "filter")),
    ("panel.max_disagreement", "from 0 to 0.25, a variance of probabilities", lambda x: 0 <= x <= 0.25),
    ("*.schedule", f"one of {', '.join(SCHEDULES)}", lambda x: x in SCHEDULES),
    ("*.moment_dtype", f"one of {', '.join(MOMENT_DTYPES)}", lambda x: x in MOMENT_DTYPES),
    ("*.keep_best", '"", "min METRIC" or "max METRIC"', lambda x: re.fullmatch(r"((min|max) \S+)?", x) is not None),
    ("*.attention", f"one of {', '.join(IMPLEMENTATIONS)}", lambda x: x in IMPLEMENTATIONS),
    ("policy.model.remat", f"one of {', '.join(REMAT)}", lambda x: x in REMAT),
    ("*.cache_dtype", f'"" or one of {", ".join(_CACHE_DTYPES)}', lambda x: x in ("", *_CACHE_DTYPES)),
    ("*.dtype", f"one of {', '.join(_DTYPES)}", lambda x: x in _DTYPES),
)
_BATCHES = "*.batch_size sampler.slots sft.*.slots critique.*.slots"
_JUDGE_BATCHES = "judge.*.slots panel.*.slots"
# What the lengths of whole passes are made of; prompts that are read before their replies may have any length.
_LENGTHS = "*.max_prompt_length *.max_response_length sft.row_length sampler.bucket_multiple"
_JUDGE_LENGTHS = "judge.bucket_multiple panel.judges.*.bucket_multiple"


def check(config: Config, mesh: Mesh, judge_mesh: Mesh) -> None:
    """Raises UserError for values that are out of range or contradict each other, before any work is done."""
    flat = flatten(config)
    for patterns, what, holds in _RANGES:
        _require(flat, patterns, what, holds)
    _check_mesh(flat, mesh, _BATCHES, _LENGTHS, "mesh")
    _check_mesh(flat, judge_mesh, _JUDGE_BATCHES, _JUDGE_LENGTHS, "mesh.judge")
    devices = batch_ways(mesh)
    for name in ("sft", "sl_cai", "reward_model", "best_of_n", "preference"):
        parts = getattr(config, name).micro_batches * devices
        _require(flat, f"{name}.batch_size", f"a multiple of {name}.micro_batches x devices, {parts}", lambda x: (
            x % parts == 0))  # fmt: skip  # noqa: B023
    for name in config.stages:
        if name in _NEEDS and _NEEDS[name] not in config.stages:
            raise UserError(f"config.stages={','.join(config.stages)}: {name} needs {_NEEDS[name]}")
    _check_lora(config, flat)
    _check_policy_stages(config, flat)
    _check_rounds(config)
    _check_rl(config, flat, devices)
    _check_judges(config)
    _check_constitution(config)
    _check_evaluation(config)
    if "overoptimisation" in config.stages:
        _check_overoptimisation(config)
    longest = config.policy.max_prompt_length + config.policy.max_response_length
    _require(flat, "sft.row_length", f"at least max_prompt_length + max_response_length of the policy, {longest}", (
        lambda x: x >= longest))  # fmt: skip
    needed_sets = ["demonstrations", "train_prompts", "evaluation_prompts"]
    needed_sets += ["red_team_prompts"] if "critique" in config.stages else []
    if "critique" in config.stages:
        _check_red_team_prompts(config, flat)
    needed_sets += ["comparisons"] if config.label.source != "ai" or config.label.audit_pairs else []
    for name in needed_sets:
        _require(flat, f"data.{name}.kind", "set", bool)
    embedded = config.data.embedded
    if embedded.complying_share + embedded.evasive_share > 1:
        raise UserError("config.data.embedded: complying_share and evasive_share are together more than 1")
    if embedded.red_team_evaluation and not embedded.red_team:
        raise UserError("config.data.embedded.red_team_evaluation needs red-team prompts: set red_team as well")
    if config.preferences.calibrate and not config.label.audit_pairs:
        raise UserError("config.preferences.calibrate=True needs label.audit_pairs of people to calibrate on")
    if "reward_model" in config.stages:
        _check_reward_model(config, flat)
    if "best_of_n" in config.stages:
        slots = config.sampler.slots
        _require(flat, "best_of_n.samples", f"at most sampler.slots, {slots}", lambda x: x <= slots)
        _require(flat, "best_of_n.sampling.temperature", "above 0, or all samples are the same", lambda x: x > 0)


def _check_lora(config: Config, flat: Mapping[str, Any]) -> None:
    lora, scratch = config.lora, not config.policy.weights
    if config.policy.adapter and scratch:
        raise UserError("config.policy.adapter goes with the weights of a model: set policy.weights")
    _require(flat, "lora.rank", "0 or more", lambda x: x >= 0)
    if not lora.rank:
        return
    _require(flat, "lora.alpha", "positive", lambda x: x > 0)
    for field, known in (("targets", TARGETS), ("stages", LORA_STAGES)):
        what = f"different ones of {', '.join(known)}"
        _require(flat, f"lora.{field}", what, lambda x: x and len(set(x)) == len(x) and set(x) <= set(known))  # noqa: B023
    adapting = set(lora.stages) & set(config.stages)
    if scratch and "sft" in adapting:
        raise UserError(
            "config.lora.stages: sft would train an adapter to random weights: leave it out, or set policy.weights"
        )
    if adapting & {"rl", "preference"} and "reference" in config.mesh.offload:
        raise UserError(
            "config.mesh.offload: the reference is what the policy's adapter is trained on, so it can't wait in host "
            "memory: take it out, or rl and preference out of lora.stages"
        )


def _check_mesh(flat: Mapping[str, Any], mesh: Mesh, batches: str, lengths: str, name: str) -> None:
    ways, sequence = batch_ways(mesh), mesh.shape["sequence"]
    what = f"a positive multiple of the {ways} devices of the batch"
    _require(flat, batches, what, lambda x: x > 0 and x % ways == 0)
    _require(flat, lengths, f"a multiple of {name}.sequence, {sequence}", lambda x: x % sequence == 0)


def _check_red_team_prompts(config: Config, flat: Mapping[str, Any]) -> None:
    """Raises UserError for more first replies than red-team prompts, where the config says how many there will be."""
    source = config.data.red_team_prompts
    known = config.data.embedded.red_team if source.kind == "embedded" else source.limit
    if known:
        most = f"at most {known}, the red-team prompts of data.red_team_prompts"
        _require(flat, "critique.prompts", most, lambda x: x <= known)


def _check_reward_model(config: Config, flat: Mapping[str, Any]) -> None:
    reward_model = config.reward_model
    for name in ("max_prompt_length", "max_response_length"):
        if getattr(reward_model, name) and not reward_model.weights:
            raise UserError(
                f"config.reward_model.{name} is in tokens of reward_model.weights: without them the reward model reads "
                "what the policy does; set it to 0"
            )
    needed = reward_model.batch_size + reward_model.validation_pairs
    _require(flat, "label.pairs", f"at least reward_model.batch_size + validation_pairs, {needed}", lambda x: (
        x >= needed))  # fmt: skip
    least = reward_model.batch_size
    _require(flat, "reward_model.train_pairs", f"0 (all) or at least reward_model.batch_size, {least}", lambda x: (
        x == 0 or x >= least))  # fmt: skip
    if reward_model.members == 1 and reward_model.combine != "mean":
        raise UserError(f"config.reward_model.combine={reward_model.combine} needs reward_model.members of 2 or more")
    if config.reward_model.calibrate and not config.reward_model.validation_pairs:
        raise UserError("config.reward_model.calibrate=True needs reward_model.validation_pairs to calibrate on")
    if reward_model.flawed_members > reward_model.members:
        raise UserError(
            f"config.reward_model.flawed_members={reward_model.flawed_members} is more than its members, "
            f"{reward_model.members}"
        )
    if bool(reward_model.flawed_members) != bool(reward_model.flaw_pattern):
        raise UserError("config.reward_model: flaw_pattern and flawed_members are set together, or neither is")
    _check_pattern("reward_model.flaw_pattern", reward_model.flaw_pattern)
    if reward_model.by_principle:
        if config.label.principles == "none" or config.label.source == "human":
            raise UserError("config.reward_model.by_principle=True needs labels by principle: set label.principles to "
                            "draw or ensemble, and label.source to ai or both")  # fmt: skip
        if reward_model.combine != "mean" or reward_model.flawed_members:
            raise UserError("config.reward_model.by_principle=True needs combine=mean and flawed_members=0")
        count = len(select("reward_model", config.constitution, ("comparison",))[0])
        _require(flat, "reward_model.members", f"{count} with by_principle, one for each principle", lambda x: (
            x == count))  # fmt: skip


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"config.{name}={pattern!r} is malformed: {error}") from error


def _check_policy_stages(config: Config, flat: Mapping[str, Any]) -> None:
    stages, preference = config.stages, config.preference
    trained = [stage for stage in stages if stage in POLICY_STAGES]
    if len(trained) > 1:
        raise UserError(f"config.stages={','.join(stages)}: only one of {', '.join(trained)} can train the policy")
    if "eval" in stages and not trained and "sl_cai" not in stages:
        raise UserError(f"config.stages={','.join(stages)}: eval needs one of sl_cai, {', '.join(POLICY_STAGES)}")
    if "preference" not in stages:
        return
    if not preference.online and "label" not in stages:
        raise UserError("config.stages: preference needs label, or preference.online=True")
    if preference.online and "label" in stages:
        raise UserError(
            "config.preference.online=True makes its own labels: leave label out of config.stages, and the reward model"
        )
    if not preference.online:
        _require(flat, "preference.batch_size", f"at most label.pairs, {config.label.pairs}", lambda x: (
            x <= config.label.pairs))  # fmt: skip
    if preference.online and config.preferences.calibrate:
        raise UserError(
            "config.preferences.calibrate=True is for the stage label: set it to False with preference.online"
        )


def _check_rounds(config: Config) -> None:
    if config.rounds == 1:
        return
    if "eval" not in config.stages:
        raise UserError(f"config.rounds={config.rounds} needs the stage eval in config.stages, to compare the rounds")
    if config.policy_stage not in POLICY_STAGES:
        raise UserError(
            f"config.rounds={config.rounds} needs a stage in config.stages that trains the policy in each of them: one "
            f"of {', '.join(POLICY_STAGES)}"
        )
    if "preference" in config.stages and config.preference.online:
        raise UserError(
            f"config.rounds={config.rounds} with preference.online=True: a round begins with new labels, but online "
            "the live policy has new pairs judged at each step; set rounds to 1, or preference.online=False and take "
            "the stage label"
        )
    if "label" not in config.stages or config.label.source == "human":
        raise UserError(
            f"config.rounds={config.rounds}: each round has new pairs of its policy labelled, which needs the stage "
            "label in config.stages with label.source=ai or both"
        )


def _check_judges(config: Config) -> None:
    """Raises UserError for a judge that can't do what it is asked, and for a panel that can't label."""
    panel, labellers = config.panel, {**config.judges}
    if panel.judges:
        labellers.pop("judge")
    for name, judge in labellers.items():
        if config.preferences.order != "both" and judge.prompt.method == "rating":
            raise UserError(f"config.preferences.order must be both where {name}.prompt.method=rating: there are no "
                            "orders")  # fmt: skip
    if config.rl.gold.judge_weights == POLICY:
        raise UserError(
            f"config.rl.gold.judge_weights={POLICY!r}: gold must not change with the policy; name a GGUF file, or "
            "leave it empty for the weights of config.judge"
        )
    if config.judge.weights == POLICY:
        raise UserError(
            f"config.judge.weights={POLICY!r}: what evaluates must not change with the policy; name a judge of its own "
            f"in panel.judges to label with the policy itself"
        )
    for name, judge in config.judges.items():
        rationale = judge.rationale
        if rationale.samples > 1 and rationale.sampling.temperature == 0:
            raise UserError(
                f"config.{name}.rationale.samples={rationale.samples} would all be the same at "
                f"{name}.rationale.sampling.temperature=0"
            )
        if rationale.samples > rationale.sampler.slots:
            raise UserError(
                f"config.{name}.rationale.samples={rationale.samples} must be at most its sampler.slots, "
                f"{rationale.sampler.slots}"
            )
    if not panel.judges:
        if panel.disagreement != "none":
            raise UserError(f"config.panel.disagreement={panel.disagreement} needs judges in panel.judges to disagree")
        if panel.combine != "mean":
            raise UserError(f"config.panel.combine={panel.combine} needs judges in panel.judges to combine")
        return
    for name, judge in panel.judges.items():
        if judge.weights == POLICY and judge.shuffle_weights:
            raise UserError(f"config.panel.judges.{name}.shuffle_weights is for weights of a file, not for {POLICY!r}")
        if not re.fullmatch(r"[\w-]+", name):  # it becomes the name of a folder
            raise UserError(f"config.panel.judges: the name {name!r} may hold letters, digits, _ and - alone")
    if "label" not in config.stages or config.label.source == "human":
        raise UserError(
            "config.panel.judges would label nothing: set panel.judges to an empty group, or take the stage label "
            "with label.source=ai or both"
        )
    if config.preferences.order != "both" and panel.combine != "mean":
        raise UserError(
            f"config.preferences.order={config.preferences.order} with panel.combine={panel.combine}: of one order "
            "there is the mean of the members alone; set panel.combine=mean or preferences.order=both"
        )


def _check_constitution(config: Config) -> None:
    """Raises UserError for principles that are not there to be judged under, and for judges that are not asked for."""
    constitution, how, judges = config.constitution, config.label.principles, config.judges
    if constitution.file:
        with blame("constitution"):
            tagged(load_constitution(constitution.file), constitution.tags)
    elif constitution.tags:
        raise UserError("config.constitution.tags needs constitution.file, whose principles have them")
    elif "critique" in config.stages:
        raise UserError("config.stages: critique needs constitution.file, whose principles it revises under")
    elif how != "none":
        raise UserError(f"config.label.principles={how} needs constitution.file, which has them")
    if "critique" in config.stages:
        select("critique", constitution, ("revision",) if config.critique.revise_only else ("critique", "revision"))
    if how != "none":
        select("label", constitution, ("comparison",))
    if how == "ensemble" and (config.panel.judges or "label" not in config.stages):
        raise UserError("config.label.principles=ensemble is for the stage label and one judge: set it to draw")
    for name, judge in judges.items():
        with blame(f"{name}.prompt.template"):
            asked = load_template(judge.prompt).by_principle
        if asked and how == "none":
            raise UserError(f"config.{name}.prompt.template={judge.prompt.template} asks for a principle: set "
                            "label.principles to draw, or to ensemble")  # fmt: skip
        labels = name != "judge" or len(judges) == 1
        if labels and not asked and how != "none":
            raise UserError(
                f"config.label.principles={how}, but the comparison of {name}.prompt.template={judge.prompt.template} "
                f"with method={judge.prompt.method} has no {{principle}}: take the template constitution"
            )
    if config.preferences.hard and config.preferences.clamp:
        raise UserError("config.preferences.clamp holds labels near 1/2, and hard=True takes them to 0 or 1: unset one")


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
    rewarded = {"rl", "best_of_n"} & set(stages)
    if rewarded and not any((rewards.reward_model, rewards.judge, rewards.verifier, rewards.length, (
            rewards.format))):  # fmt: skip
        raise UserError("config.rl.rewards has no part with a weight, so there is nothing to learn")
    if rewarded and "reward_model" not in stages:
        if rewards.reward_model:
            raise UserError("config.rl.rewards.reward_model needs the stage reward_model in config.stages, or to be 0")
        if "rl" in stages and rl.advantage == "gae" and rl.value_init == "reward_model":
            raise UserError(
                "config.rl.value_init=reward_model needs the stage reward_model in config.stages; without it set "
                "rl.value_init=sft"
            )
    if "rl" in stages and rl.advantage == "gae" and rl.value_init == "reward_model" and config.reward_model.weights:
        raise UserError(
            "config.rl.value_init=reward_model: the value network has the policy's shape and tokenizer, and "
            f"reward_model.weights={config.reward_model.weights} its own; set rl.value_init=sft"
        )
    _check_scorers(config, rewards, "rl.rewards")
    _check_scorers(config, rl.gold, "rl.gold")
    if bool(rl.gold.reward_model) != bool(rl.gold.reward_model_run):
        raise UserError(
            "config.rl.gold.reward_model is the weight and rl.gold.reward_model_run the folder of a finished run: give "
            "both, or neither"
        )
    if rewards.format and not rewards.format_pattern:
        raise UserError("config.rl.rewards.format needs rl.rewards.format_pattern, a regular expression")
    longest = config.policy.max_response_length - 1
    if rewards.length:
        _require(flat, "rl.rewards.length_limit", f"at most {longest}, or no response (policy.max_response_length) is "
                 "beyond it", lambda x: x <= longest)  # fmt: skip
    _check_pattern("rl.rewards.format_pattern", rewards.format_pattern)


def _check_scorers(config: Config, scorers: ScorersConfig, group: str) -> None:
    if scorers.judge and (scorers.judge_prompt.method != "rating" or scorers.judge_prompt.chain_of_thought):
        raise UserError(
            f"config.{group}.judge needs {group}.judge_prompt.method=rating without chain_of_thought: each response is "
            "rated by itself"
        )
    truth = config.data.evaluation_prompts.kind == "embedded"
    if scorers.verifier and scorers.verifier_function == "ground_truth" and not truth:
        raise UserError(
            f"config.{group}.verifier_function=ground_truth: only embedded data has a ground truth; name a "
            "module:function of yours"
        )


def _check_evaluation(config: Config) -> None:
    for name in ("harmless_prompt", "helpful_prompt"):
        prompt = getattr(config.evaluation, name)
        if prompt.template and (prompt.method != "rating" or prompt.chain_of_thought):
            raise UserError(
                f"config.evaluation.{name} needs method=rating without chain_of_thought: each reply is rated by itself"
            )


def _check_overoptimisation(config: Config) -> None:
    gold = config.rl.gold
    if not (gold.judge or gold.verifier or gold.reward_model):
        raise UserError(
            "config.stages: overoptimisation needs a gold reward to hold the proxy against: give rl.gold.judge, "
            "rl.gold.verifier or rl.gold.reward_model a weight"
        )
    chosen, samples = config.overoptimisation.numbers, config.overoptimisation.samples
    if len(chosen) < 3 or list(chosen) != sorted(set(chosen)) or chosen[0] < 2 or chosen[-1] > samples:
        raise UserError(
            f"config.overoptimisation.best_of={chosen} must be three or more rising numbers from 2 to "
            f"overoptimisation.samples, {samples}"
        )


def check_decoder(model: ModelConfig, prompt_and_response: int) -> None:
    """Raises UserError for a decoder that can't be built, or that is too short for what it is to read (in tokens)."""
    flat = {f"policy.model.{name}": value for name, value in dataclasses.asdict(model).items()}
    sizes = " ".join(f"policy.model.{field.name}" for field in _sizes())
    _require(flat, sizes, "positive", lambda x: x > 0)
    _require(flat, "*.family", f"one of {', '.join(FAMILIES)}", lambda x: x in FAMILIES)
    kv_heads = model.num_key_value_heads
    _require(flat, "*.num_attention_heads", f"a multiple of num_key_value_heads, {kv_heads}", lambda x: (
        x % kv_heads == 0))  # fmt: skip
    if FAMILIES[model.family].fused:
        same = f"num_attention_heads, as in all models of {model.family}"
        _require(flat, "*.num_key_value_heads", same, lambda x: x == model.num_attention_heads)
    _require(flat, "*.head_dim", "even", lambda x: x % 2 == 0)
    _require(flat, "*.max_position_embeddings", f"at least max_prompt_length + max_response_length of the policy, "
             f"{prompt_and_response}", lambda x: x >= prompt_and_response)  # fmt: skip


def _sizes() -> list[dataclasses.Field]:
    """The numbers that every decoder has."""
    numbers = (field for field in dataclasses.fields(ModelConfig) if field.type in (int, float))
    return [field for field in numbers if field.default is dataclasses.MISSING]


def _require(flat: Mapping[str, Any], patterns: str, what: str, holds: Callable[[Any], bool]) -> None:
    for pattern in patterns.split():
        for name in fnmatch.filter(flat, pattern):
            if not holds(flat[name]):
                raise UserError(f"config.{name}={flat[name]!r} must be {what}")
