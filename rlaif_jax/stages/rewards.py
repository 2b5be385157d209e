"""The parts of a reward that need the text of a response: the judge's rating, a verifier, a format, a length, and a
reward model with a tokenizer of its own.

And the gold reward, of a judge, a verifier or the reward model of another run, that is measured and not trained on.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from rlaif_jax.config import ScorersConfig
from rlaif_jax.errors import UserError, blame
from rlaif_jax.judge.score import Judge, JudgeConfig, load_judge, rate
from rlaif_jax.models.parameters import to_device
from rlaif_jax.parallel import processes
from rlaif_jax.stages.folders import last_round, name_in_round, stage_folder
from rlaif_jax.stages.reading import Reader, reward_reader
from rlaif_jax.stages.replies import Replies
from rlaif_jax.stages.reward_model import load_reward_model, member_scores, score
from rlaif_jax.stages.run import Run, reopen_run
from rlaif_jax.stages.verifier import Verifier, find_verifier, verified
from rlaif_jax.training.reward_models import RewardModel, combined_reward, principle_metrics

# name -> its weight, and a value for each response, NaN where there is none
Parts = dict[str, tuple[float, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class TextRewardModel:
    """A reward model that reads texts by its own tokenizer, whatever tokens they were sampled as."""

    run: Run  # that has trained it
    reader: Reader
    reward_model: RewardModel  # where it waits between uses
    batch_size: int  # responses scored at a time
    field: str  # of the config that asked for it

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The reward of each response, [n] float64, and the metrics of its principles.

        ended: which responses have an end of sequence to be read. Of one that is too long what fits is scored; what
        share of them had to do without their end is `reward/reward_model_cut`. Raises UserError for a prompt that is.
        """
        with blame(self.field):
            sequences = self.reader.sequences(prompts, responses, ended)
        rest = processes.to_host(self.reward_model.replace(params={}))
        each = member_scores(self.run, to_device(self.reward_model), sequences, self.batch_size) - rest.means[:, None]
        shares = jax.device_get(principle_metrics(rest, each))
        metrics = {"reward/reward_model_cut": self.reader.cut(sequences, ended).mean()} | shares
        values = np.asarray(combined_reward(rest, each), float)
        return values, {name: float(value) for name, value in metrics.items()}


@dataclasses.dataclass(frozen=True)
class Scorers:
    """What scores texts of a config group, where it has a weight."""

    config: ScorersConfig
    group: str  # where the config has them
    judge: Judge | None
    verifier: Verifier | None
    reward_model: TextRewardModel | None = None

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]
    ) -> tuple[Parts, dict[str, float]]:
        """What they make of each response, and what the reward model says besides."""
        parts: Parts = {}
        metrics: dict[str, float] = {}
        if self.judge:
            parts["judge"] = self.config.judge, rate(self.judge, prompts, responses)
        if self.verifier:
            verify = functools.partial(verified, self.verifier, self.config.verifier_function, self.group)
            parts["verifier"] = self.config.verifier, np.array(processes.parted(prompts, verify, responses), float)
        if self.reward_model:
            values, metrics = self.reward_model(prompts, responses, ended)
            parts["reward_model"] = self.config.reward_model, values
        return parts, metrics


@dataclasses.dataclass(frozen=True)
class TextRewards:
    """What is loaded to score texts."""

    run: Run
    scorers: Scorers

    @property
    def needed(self) -> bool:
        """Whether any part of the reward needs the texts."""
        rewards = self.run.config.rl.rewards
        return any((rewards.judge, rewards.verifier, rewards.format, rewards.length, self.scorers.reward_model))

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], lengths: np.ndarray, ended: Sequence[bool]
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The weighted sum of the parts, [n] float32 with NaN where one of them is missing, and the mean of each.

        lengths: [n] tokens of each response. ended: [n], false for one that was cut off at the limit.
        """
        config, (parts, metrics) = self.run.config.rl.rewards, self.scorers(prompts, responses, ended)
        if config.format:
            matches = [re.fullmatch(config.format_pattern, text, re.DOTALL) is not None for text in responses]
            parts["format"] = config.format, np.array(matches, float)
        if config.length:
            parts["length"] = config.length, -np.maximum(lengths - config.length_limit, 0.0)
        known = {name: values[np.isfinite(values)] for name, (_, values) in parts.items()}
        means = {f"reward/{name}": float(x.mean()) for name, x in known.items() if len(x)}
        return _total(parts, len(responses)).astype(np.float32), metrics | means


@dataclasses.dataclass(frozen=True)
class Gold:
    """The gold reward of responses."""

    scorers: Scorers

    @property
    def needed(self) -> bool:
        """Whether there is one: any part of it has a weight."""
        config = self.scorers.config
        return bool(config.judge or config.verifier or config.reward_model)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> np.ndarray:
        """The weighted sum of its parts: [n] float64, NaN where one of them is missing."""
        parts, _ = self.scorers(prompts, responses, ended)
        return _total(parts, len(responses))

    def metrics(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> dict[str, float]:
        """Mean and deviation over the responses that have one, and the share of those that have none."""
        values = self(prompts, responses, ended)
        known = values[np.isfinite(values)]
        moments = {"gold/mean": float(known.mean()), "gold/std": float(known.std())} if len(known) else {}
        return moments | {"gold/unscored": 1 - len(known) / len(values)}


def _total(parts: Parts, count: int) -> np.ndarray:
    """The weighted sum: [count] float64, NaN where a part is not finite."""
    total = sum((weight * values for weight, values in parts.values()), np.zeros(count))
    return np.where(np.isfinite(total), total, np.nan)


def proxy_scores(
    run: Run,
    rewards: TextRewards,
    reward_model: RewardModel | None,
    replies: Replies,
    prompts: Sequence[str],
    batch_size: int,
) -> np.ndarray:
    """All parts of `rl.rewards` together, as RL's reward/mean: [n] float64, NaN where a part is missing.

    reward_model: as `load_token_reward_model`. prompts: one a reply. batch_size: replies that it scores at a time.
    """
    lengths = replies.sequences.response_mask.sum(axis=1)
    scores = rewards(prompts, replies.texts, lengths, replies.ended)[0].astype(float)
    if reward_model is not None:
        scores += run.config.rl.rewards.reward_model * score(run, reward_model, replies.sequences, batch_size)
    return scores


def score_replies(
    run: Run, rewards: TextRewards, reward_model: RewardModel | None, replies: Replies, prompts: list[str]
) -> np.ndarray:
    """`proxy_scores` of replies, with what RL gives those that were cut off at the limit."""
    config, batch_size = run.config.rl, run.config.evaluation.batch_size
    scores = proxy_scores(run, rewards, reward_model, replies, prompts, batch_size)
    if config.penalise_missing_eos:
        scores = np.where(np.array(replies.ended) | np.isnan(scores), scores, config.missing_eos_reward)
    return scores


def load_rewards(run: Run) -> TextRewards:
    """Loads the judge, and a reward model of weights of its own, and finds the verifier, where they have a weight.

    Raises UserError where they can't be.
    """
    config = run.config.rl.rewards
    scorers = _load(run, config, "rl.rewards", run.config.judge)
    if config.reward_model and run.config.reward_model.weights:
        scorers = dataclasses.replace(scorers, reward_model=load_text_reward_model(run, run, "reward_model"))
    return TextRewards(run, scorers)


def load_token_reward_model(run: Run) -> RewardModel | None:
    """The reward model, where it has a weight and reads the policy's own tokens: the others are in `load_rewards`."""
    wanted = run.config.rl.rewards.reward_model and not run.config.reward_model.weights
    return load_reward_model(run) if wanted else None


def load_text_reward_model(run: Run, other: Run, field: str) -> TextRewardModel:
    """The reward model of the other run, or of the same, that a field of the config has score texts."""
    reward_model = run.waiting("reward_model", load_reward_model(other))
    return TextRewardModel(other, reward_reader(other), reward_model, run.config.evaluation.batch_size, field)


def load_gold(run: Run) -> Gold:
    """As `load_rewards`, of the gold reward; its judge knows what it says, be the other one shuffled."""
    gold, judge = run.config.rl.gold, run.config.judge
    judge = dataclasses.replace(judge, weights=gold.judge_weights or judge.weights, shuffle_weights=False)
    scorers = _load(run, gold, "rl.gold", judge)
    return Gold(dataclasses.replace(scorers, reward_model=_other_reward_model(run) if gold.reward_model else None))


def normalisation_file(workdir: str) -> epath.Path:
    """What says that the reward model of another run is trained, of its last round that has one.

    Raises UserError where there is none.
    """
    name = name_in_round("reward_model", _last_trained(epath.Path(workdir)))
    file = stage_folder(epath.Path(workdir), name) / "normalisation.json"
    if not file.exists():
        raise UserError(
            f"config.rl.gold.reward_model_run={workdir}: {file} is missing: run its stage reward_model first"
        )
    return file


def _last_trained(workdir: epath.Path) -> int:
    return last_round(functools.partial(stage_folder, workdir), "reward_model", "normalisation.json")


def _other_reward_model(run: Run) -> TextRewardModel:
    """The reward model of `rl.gold.reward_model_run`."""
    folder = epath.Path(run.config.rl.gold.reward_model_run)
    normalisation_file(str(folder))
    other = reopen_run(folder, run.placement.mesh).in_round(_last_trained(folder))
    return load_text_reward_model(run, other, "rl.gold.reward_model_run")


def _load(run: Run, config: ScorersConfig, group: str, judge_config: JudgeConfig) -> Scorers:
    judge, verifier = None, None
    if config.judge:
        judge = load_judge(
            dataclasses.replace(judge_config, prompt=config.judge_prompt), run.config.seed, run.judge_placement
        ).moved(functools.partial(run.waiting, "judge"))
    if config.verifier:
        verifier = _verifier(run, config, group)
    return Scorers(config, group, judge, verifier)


def _verifier(run: Run, config: ScorersConfig, group: str) -> Verifier:
    if config.verifier_function != "ground_truth":
        return find_verifier(config.verifier_function, group)
    truth = run.ground_truth()
    return lambda prompts, responses: list(map(truth.is_good, prompts, responses))
