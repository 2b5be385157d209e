"""The Bradley-Terry reward model: trained on the judge's soft labels, calibrated on labels that it did not see, and
centred on samples of the SFT policy. Several members are one program; how they are put together is for its readers.
"""

import collections
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize, stats

from rlaif_jax.config import RewardModelConfig
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.audit import agreement
from rlaif_jax.evaluation.calibration import expected_calibration_error
from rlaif_jax.evaluation.statistics import Figure, bootstrap_ci, mean_ci
from rlaif_jax.files import read_json, write_json
from rlaif_jax.judge.constitution import Principle, draw, select
from rlaif_jax.losses.reward import bradley_terry_loss
from rlaif_jax.models.lora import Start, start
from rlaif_jax.models.parameters import init_parameters
from rlaif_jax.models.transformer import HEAD, ScalarModel
from rlaif_jax.parallel.mesh import shard_batch
from rlaif_jax.parallel.processes import put, to_host
from rlaif_jax.stages.label import ground_truth_agreement
from rlaif_jax.stages.preferences import Comparisons, encode_comparisons, over_pairs, read_preferences
from rlaif_jax.stages.principles import draws
from rlaif_jax.stages.reading import check_prompts, reward_reader
from rlaif_jax.stages.replies import padded_batches
from rlaif_jax.stages.run import Run, shuffled_batches
from rlaif_jax.training.loop import LoopConfig, train
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.reward_models import RewardModel, member_rewards, over_members, rewards_of, side_by_side, stack
from rlaif_jax.training.sequences import Sequences, response_rewards
from rlaif_jax.training.state import TrainState, abstract_state, init_state
from rlaif_jax.training.step import train_step


def reward_loss(params, batch: Comparisons, model: ScalarModel, config: RewardModelConfig):
    """Weighted sum over pairs, their weight, and sums of metrics: a `training.step.Loss`."""
    reward_a = response_rewards(model, params, batch.a)
    reward_b = response_rewards(model, params, batch.b)
    total, weight = bradley_terry_loss(reward_a, reward_b, batch.prob_a, batch.weight, config.margin, config.centring)
    difference = reward_a - reward_b
    agrees = (difference > 0) == (batch.prob_a > 0.5)
    metrics = {"accuracy": agrees, "margin": abs(difference)}
    return total, weight, {name: ((batch.weight * value).sum(), weight) for name, value in metrics.items()}


def run_reward_model(run: Run) -> None:
    """Reads `label/`; writes `reward_model/` checkpoints, normalisation.json and results.json.

    The last pairs are held out. Each member has an order of the data and, but for "weights", a head of its own; with
    `by_principle` it learns the labels of one principle alone.
    """
    config, table = run.config.reward_model, read_preferences(run)
    check_prompts(run)
    comparisons, model = encode_comparisons(reward_reader(run), table), run.reward_model()
    optimizer = make_optimizer(config.optimizer, config.steps)
    trained, _ = split_rows(config, table["pair"])
    rows_by_member, what = _rows_by_member(run, table, trained), "reward_model.batch_size"
    whats = [f"{what}, for the principle {each.id}," for each in _principles(run)] or [what] * config.members
    batches = [
        shuffled_batches(rows, config.batch_size, run.order_seed(name), what)
        for name, rows, what in zip(_names(config.members), rows_by_member, whats, strict=True)
    ]
    labels = _labels_by_member(config, table, comparisons.prob_a)

    step_fn, lora = step_function(model, optimizer, config), run.lora("reward_model")
    abstract = side_by_side(abstract_state(model, optimizer, run.placement, lora), config.members)
    kept = _begins(run, model) if lora else None
    frozen = kept[0].frozen if kept else {}
    whole = functools.partial(run.whole_params, "reward_model", frozen, members=config.members)

    def init() -> TrainState:
        begins = kept or _begins(run, model)  # made here, so that what they begin with does not stay
        members = [init_state(model, begin.trained(), optimizer, run.placement, lora) for begin in begins]
        return stack(members, abstract)

    def next_step(state: TrainState, step: int):
        rows = np.stack([each[step] for each in batches])
        of_members = [
            jax.tree.map(lambda x, chosen=chosen: x[chosen], comparisons.replace(prob_a=prob_a))
            for chosen, prob_a in zip(rows, labels, strict=True)
        ]
        sharded = [shard_batch(batch, run.placement.mesh) for batch in of_members]
        state, metrics = step_fn(state, sharded, frozen)
        tokens = sum(x.prompt_mask[rows].sum() + x.response_mask[rows].sum() for x in (comparisons.a, comparisons.b))
        params = state.params
        samples = lambda: _compared(run, whole(params), table, comparisons, rows[0]) if step + 1 == config.steps else []  # noqa: E731
        return state, metrics | {"tokens": tokens}, samples

    loop = LoopConfig(config.steps, config.checkpoint_every, config.keep_best, config.max_skipped_updates)
    state = train(run.folder("reward_model"), loop, abstract, init, next_step)
    _finish(run, whole(state.params), table, comparisons)


def _begins(run: Run, model: ScalarModel) -> list[Start]:
    """What each member begins with: the same parameters, with a head of its own where they have none."""
    config, lora = run.config.reward_model, run.lora("reward_model")
    base = functools.cache(lambda: run.base_params("reward_model"))

    def params(number: int) -> dict:
        own = {name: part for name, part in base().items() if name in ("decoder", *HEAD)}
        return init_parameters(model, run.key("reward_head", number), run.placement, HEAD) | own

    # An average of weights means something between models that began alike (WARM, section 3).
    numbers = [0 if config.combine == "weights" else i for i in range(config.members)]
    keys = [run.key("reward_model adapter", number) for number in numbers]
    return [
        start(model, lora, functools.partial(params, number), key, run.placement)
        for number, key in zip(numbers, keys, strict=True)
    ]


def step_function(
    model: ScalarModel, optimizer: optax.GradientTransformation, config: RewardModelConfig
) -> jax.stages.Wrapped:
    """(state of all members, a batch of each, frozen) -> (state, metrics), compiled; the state is donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batches: list[Comparisons], frozen: dict):
        def step_of_one(model: ScalarModel, state: TrainState, batch: Comparisons):
            loss = functools.partial(reward_loss, model=model, config=config)
            return train_step(state, batch, loss, optimizer, config.micro_batches, frozen)

        state, metrics = over_members(step_of_one, model, state, jax.tree.map(lambda *x: jnp.stack(x), *batches))
        counts = ("skipped", "skipped_updates")
        return state, {name: jnp.sum(x) if name in counts else jnp.mean(x) for name, x in metrics.items()}

    return step


def split_rows(config: RewardModelConfig, pairs: Sequence[int]) -> tuple[range, slice]:
    """The rows that are trained on, and those held out. No pair is in both.

    pairs: the number of each row's pair, rising.
    """
    firsts = np.append(np.flatnonzero(np.diff(pairs, prepend=-1)), len(pairs))  # of each pair, and where they end
    count = max(len(firsts) - 1 - config.validation_pairs, 0)
    return range(firsts[min(count, config.train_pairs or count)]), slice(firsts[count], None)


def _labels_by_member(config: RewardModelConfig, table: Mapping[str, list], prob_a: np.ndarray) -> list[np.ndarray]:
    """What each member learns: the labels [pairs], or, with the planted flaw, what the pattern makes of them."""
    matches = [
        np.array([re.fullmatch(config.flaw_pattern, text, re.DOTALL) is not None for text in table[f"response_{side}"]])
        for side in "ab"
    ]
    flawed = np.where(matches[0] == matches[1], prob_a, matches[0]).astype(np.float32)
    return [flawed if i < config.flawed_members else prob_a for i in range(config.members)]


def _rows_by_member(run: Run, table: Mapping[str, list], rows: Sequence[int]) -> list[Sequence[int]]:
    """The rows that each member learns: all of them, or those of its principle and those of people, who have none."""
    config = run.config.reward_model
    if not config.by_principle:
        return [rows] * config.members
    of = table["principle"]
    return [[row for row in rows if of[row] in (each.id, None)] for each in _principles(run)]


def check_labels_by_principle(run: Run) -> None:
    """Raises UserError where the member of a principle will have fewer labels to learn from than make a batch.

    Which principle a row draws is known before any work; that a pair will have no label is not. Where people's labels
    are mixed with the judge's, their share of what is trained on is an expected one.
    """
    config, label = run.config.reward_model, run.config.label
    if "reward_model" not in run.config.stages or not config.by_principle or label.principles != "draw":
        return
    people = label.pairs if label.source == "both" else 0  # labels that every member learns
    trained, _ = split_rows(config, range(label.pairs + people))
    judged = range(label.pairs) if people else trained
    share = len(trained) / (len(judged) + people)
    principles = _principles(run)
    for number in range(1, run.config.rounds + 1):
        drawn = collections.Counter(each.id for each in draw(principles, draws(run.in_round(number)), judged))
        for principle in principles:
            count = int(share * (drawn[principle.id] + people))
            if count < config.batch_size:
                raise UserError(
                    f"config.reward_model.by_principle=True: the principle {principle.id} has {count} labels to learn "
                    f"from{f' in round {number}' if number > 1 else ''}, fewer than a batch of reward_model.batch_size="
                    f"{config.batch_size}: raise label.pairs or the weight of the principle, or make batches smaller"
                )


def _names(members: int) -> list[str]:
    """What the order of each member's data is drawn from."""
    return ["reward_model", *(f"reward_model {i}" for i in range(1, members))]


def _compared(run: Run, params, table: Mapping[str, list], comparisons: Comparisons, rows: np.ndarray) -> list[dict]:
    """Some pairs with what the reward model makes of them, for samples.jsonl."""
    some = jax.tree.map(lambda x: x[rows], comparisons)
    reward_model = _uncalibrated(run, params, _weights(_principles(run)))
    columns = (score(run, reward_model, x, len(rows)).tolist() for x in (some.a, some.b))
    names = ("prompt", "response_a", "response_b", "prob_a")
    return [
        {name: table[name][row] for name in names} | {"reward_a": reward_a, "reward_b": reward_b}
        for row, reward_a, reward_b in zip(rows, *columns, strict=True)
    ]


def _principles(run: Run) -> list[Principle]:
    """The principle of each member, as the constitution now has them; none without `by_principle`."""
    if not run.config.reward_model.by_principle:
        return []
    return select("reward_model", run.config.constitution, ("comparison",))[0]


def _weights(principles: Sequence[Principle]) -> dict[str, float]:
    return {principle.id: principle.weight for principle in principles}


def _uncalibrated(run: Run, params, principles: Mapping[str, float]) -> RewardModel:
    """The reward model of trained parameters [members, ...], before what it says is centred and calibrated.

    principles: of each member, where it learned one, with its weight.
    """
    config = run.config.reward_model
    if config.combine == "weights":
        params = jax.tree.map(lambda x: jnp.mean(x, axis=0, keepdims=True), params)
    members = 1 if config.combine == "weights" else config.members
    means, zero, one = (_whole(run, x) for x in (np.zeros(members), 0, 1))
    found = RewardModel(params, means, zero, one, config.combine, config.uncertainty_coef)
    if not principles:
        return found
    weights = np.array([*principles.values()], np.float32)
    return found.replace(weights=_whole(run, weights / weights.sum()), principles=tuple(principles))


def _whole(run: Run, x) -> jax.Array:
    """A number or an array of them in float32, on every device."""
    return put(np.asarray(x, np.float32), run.placement.whole)


def _finish(run: Run, params, table: Mapping[str, list], comparisons: Comparisons) -> None:
    """Centres and calibrates the members, and says how good they are together on the pairs held out."""
    config, folder, principles = run.config.reward_model, run.folder("reward_model"), _weights(_principles(run))
    reward_model = _uncalibrated(run, params, principles)
    members = [member_scores(run, reward_model, x, config.batch_size) for x in (comparisons.a, comparisons.b)]
    means = np.concatenate(members, axis=1).mean(axis=1)  # [members]
    centred = reward_model.replace(means=_whole(run, means))
    rewards = [score(run, centred, x, config.batch_size) for x in (comparisons.a, comparisons.b)]
    _, held_out = split_rows(config, table["pair"])
    pairs = {name: values[held_out] for name, values in table.items()}
    normalisation = _normalisation(run, *rewards, held_out, pairs) | {"member_means": means.tolist()}
    normalisation |= {"principles": principles} if principles else {}
    write_json(folder / "normalisation.json", normalisation)
    lengths = [x.response_mask[held_out].sum(axis=1) for x in (comparisons.a, comparisons.b)]
    a, b = (normalisation["scale"] * x[held_out] for x in rewards)
    write_json(folder / "results.json", _figures(run, pairs, a, b, lengths, [x[:, held_out] for x in members]))
    if not normalisation["scale"]:
        print("reward_model: predicts held-out labels no better than chance; its rewards are set to 0", flush=True)


def _figures(run: Run, table: Mapping[str, list], reward_a, reward_b, lengths, members) -> dict[str, Figure]:
    """Accuracy, calibration and length correlation on held-out pairs; rewards are calibrated.

    table: the columns of `read_preferences`, whose rows these are. reward_a, reward_b: [rows]. lengths: of responses a
    and b, [rows] tokens each. members: their raw rewards of a and b, [members, rows] each.
    """
    if not len(reward_a):
        return {}
    resamples, seed, pairs = run.config.evaluation.bootstrap_samples, run.config.seed, table["pair"]
    mean = lambda values: mean_ci(over_pairs(values, pairs), resamples, seed)  # noqa: E731
    prob_a, label = 1 / (1 + np.exp(reward_b - reward_a)), np.array(table["prob_a"])
    figures = {"reward_model_accuracy/held_out": mean(agreement(prob_a, label))}
    figures["reward_model_calibration/brier"] = mean((prob_a - label) ** 2)
    figures["reward_model_calibration/ece"] = bootstrap_ci(
        (over_pairs(prob_a, pairs), over_pairs(label, pairs)),
        expected_calibration_error, resamples, seed, centred=True,
    )  # fmt: skip
    columns = [over_pairs(x, pairs) for x in (reward_a - reward_b, lengths[0] - lengths[1])]
    known = all(np.ptp(column) for column in columns)
    figures["reward_model_length_correlation"] = (
        bootstrap_ci(columns, _rank_correlation, resamples, seed) if known else mean_ci([], resamples, seed)
    )
    if truth := run.ground_truth():
        firsts = np.unique(pairs, return_index=True)[1]  # what is not of a label is the same in all rows of a pair
        rows = [{name: values[i] for name, values in table.items()} for i in firsts]
        values = ground_truth_agreement(truth, rows, prob_a[firsts])
        figures["reward_model_accuracy/held_out_ground_truth"] = mean_ci(values, resamples, seed)
    if len(members[0]) > 1:
        agree = (members[0] > members[1]) == (label > 0.5)
        figures["reward_model_accuracy/mean_of_members"] = mean(agree.mean(axis=0))
        figures["reward_model_disagreement"] = mean(np.var(members[0] - members[1], axis=0))
    return figures


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where one of the two is all the same."""
    return float(stats.spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0


def _normalisation(
    run: Run, reward_a: np.ndarray, reward_b: np.ndarray, held_out: slice, table: Mapping[str, list]
) -> dict:
    """The mean of all rewards, their scale, and how well the held-out labels are predicted.

    table: the columns of `read_preferences`, of the rows held out.
    """
    config, rewards = run.config.reward_model, np.concatenate([reward_a, reward_b])
    normalisation = {"mean": float(rewards.mean()), "std": float(rewards.std()), "n": len(rewards), "scale": 1.0}
    if config.validation_pairs:
        margins, labels, pairs = (reward_a - reward_b)[held_out], np.array(table["prob_a"]), table["pair"]
        losses, right = (over_pairs(x, pairs) for x in (_losses(margins, labels), (margins > 0) == (labels > 0.5)))
        normalisation |= {
            "scale": calibrated_scale(margins, labels, pairs, config.min_evidence) if config.calibrate else 1.0,
            "validation_loss": float(losses.mean()),  # 0.693 for a reward model that knows nothing
            "validation_accuracy": float(right.mean()),
            "validation_pairs": len(losses),
        }
    return normalisation


def calibrated_scale(margins: np.ndarray, prob_a: np.ndarray, pairs: Sequence[int], min_evidence: float) -> float:
    """The factor in [0, 10] on rewards that predicts held-out labels best; 0 where that shows no more than chance.

    Temperature scaling (Guo et al., arXiv 1706.04599) of sigmoid(reward_a - reward_b). A policy is not to follow
    rewards that do not hold beyond the pairs they were trained on: their mean gain in log-likelihood over knowing
    nothing must be `min_evidence` standard errors above 0. Labels of one pair are not independent: each pair counts
    once, with their mean gain.

    margins: [rows], reward_a - reward_b; prob_a: [rows], the labels; pairs: [rows], the number of the pair, rising.
    """

    def gains(scale: float) -> np.ndarray:
        """Of each pair, over rewards that say nothing."""
        return over_pairs(_losses(np.zeros_like(margins), prob_a) - _losses(scale * margins, prob_a), pairs)

    best = optimize.minimize_scalar(lambda scale: -np.mean(gains(scale)), bounds=(0, 10)).x
    found = gains(best)
    standard_error = np.std(found) / np.sqrt(len(found))
    return float(best) if np.mean(found) > min_evidence * standard_error else 0.0


def _losses(margins: np.ndarray, prob_a: np.ndarray) -> np.ndarray:
    """-log-likelihood of each label: [rows], nats."""
    return np.logaddexp(0, margins) - prob_a * margins


def load_reward_model(run: Run) -> RewardModel:
    """The trained reward model, scaled and shifted so that samples of the SFT policy have mean reward 0.

    (Stiennon et al., arXiv 2009.01325: only differences of rewards are trained, so the offset is free.)
    """
    file = run.folder("reward_model") / "normalisation.json"
    if not file.exists():
        raise UserError(f"{file} is missing: run --stages=reward_model to its end")
    normalisation = read_json(file)
    means, offset, scale = (_whole(run, normalisation[name]) for name in ("member_means", "mean", "scale"))
    params = run.trained_params("reward_model", run.reward_model(), run.config.reward_model.members)
    # Those that it was trained by: the file of the constitution may say something else by now.
    principles = normalisation.get("principles", {})
    if run.config.reward_model.by_principle and not principles:
        raise UserError(f"{file} is of another version, without the principles of its members: train it again")
    reward_model = _uncalibrated(run, params, principles)
    return reward_model.replace(means=means, offset=offset, scale=scale)


def one_member(reward_model: RewardModel, number: int) -> dict:
    """The parameters of a member, with its centring in its bias and the scale in its head: its rewards by itself."""
    params = jax.tree.map(lambda x: x[number], reward_model.params)
    bias = params["bias"] - reward_model.means[number] - reward_model.offset
    return params | {"kernel": reward_model.scale * params["kernel"], "bias": reward_model.scale * bias}


def score(run: Run, reward_model: RewardModel, sequences: Sequences, batch_size: int) -> np.ndarray:
    """The reward of each response: [n] float32 on the host."""
    return _in_batches(functools.partial(_rewards, run.reward_model(), reward_model), run, sequences, batch_size)


def member_scores(run: Run, reward_model: RewardModel, sequences: Sequences, batch_size: int) -> np.ndarray:
    """What each member says of each response by itself: [members, n] float32 on the host."""
    of_batch = functools.partial(score_members, run.reward_model(), reward_model.params)
    return _in_batches(of_batch, run, sequences, batch_size)


def _in_batches(rewards: Callable[[Sequences], jax.Array], run: Run, sequences: Sequences, batch_size: int):
    found = [
        to_host(rewards(batch))[..., :rows] for rows, batch in padded_batches(sequences, batch_size, run.placement)
    ]
    return np.concatenate(found, axis=-1)


def score_texts(
    run: Run, reward_model: RewardModel, pairs: Mapping[str, list], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rewards of both responses of each pair (`prompt`, `response_a`, `response_b`): two [n] float32.

    A response that does not fit the reward model's length is scored by what fits.
    """
    ended, weight = [True] * len(pairs["prompt"]), [1.0] * len(pairs["prompt"])
    table = {**pairs, "ended_a": ended, "ended_b": ended, "weight": weight}
    encoded = encode_comparisons(reward_reader(run), table)
    return tuple(score(run, reward_model, x, batch_size) for x in (encoded.a, encoded.b))


_rewards, score_members = jax.jit(rewards_of, static_argnums=0), jax.jit(member_rewards, static_argnums=0)
