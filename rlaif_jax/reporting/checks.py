"""What may speak against a run's result: each check passes, raises an alarm, or says that it could not be made."""

import dataclasses
import math

from rlaif_jax.config import AlarmsConfig
from rlaif_jax.evaluation.statistics import wilson_ci
from rlaif_jax.reporting.read import RunData
from rlaif_jax.reporting.words import count, number, percent, with_interval
from rlaif_jax.training.alarms import alarms

DIVERSITY = 0.8  # of SFT's distinct bigrams: less is an alarm
REPETITION = 0.05  # of the prompts with one and the same reply: more is an alarm
LENGTH = 1.25  # times SFT's mean length, or a fraction of 1 over this: beyond is an alarm
SAME_SLOT = 0.9  # of the pairs with one and the same slot named in both orders: more is noted
SCALE = 0.05  # of calibrated rewards: less means that the held-out labels bear out next to nothing


@dataclasses.dataclass(frozen=True)
class Check:
    """One check and its outcome."""

    name: str
    level: str  # "ok", "alarm", "note" (known, and not wrong in itself) or "open" (not measured)
    text: str


def run_checks(run: RunData) -> list[Check]:
    """All checks, in the order of reading; those of stages that the config has not are left out."""
    results = run.results or {}
    checks = [_independence(results), *(
        check(results, run.title) for check in (_diversity, _repetition, _length))]  # fmt: skip
    if "reward_model" in run.planned:
        checks.append(_reward_model(run.normalisation, bool(run.config.get("reward_model.calibrate"))))
    checks += [*([_training(run)] if "rl" in run.planned else []), _judge(run)]
    if "label" in run.planned:
        checks.append(_failures("Labels", run.label_manifest, run))
    return [*checks, _failures("Evaluation pairs", run.eval_manifest, run)]


def _independence(results: dict) -> Check:
    same, name = results.get("judge_is_training_judge"), "Independent judge"
    if same is None:
        return Check(name, "open", "Not measured yet.")
    if same:
        text = "The judge that evaluates is the judge that labelled or rewarded in training, so it marks its own work."
        return Check(name, "note", text)
    return Check(name, "ok", "The judge that evaluates did not label the training pairs.")


def _both(results: dict, name: str) -> tuple[float, float] | None:
    figures = [results.get(f"{name}/{policy}") for policy in ("sft", "policy")]
    means = [figure["mean"] if figure else None for figure in figures]
    return None if None in means else tuple(means)


def _diversity(results: dict, title: str) -> Check:
    means = _both(results, "distinct_2")
    if means is None or means[0] == 0:
        return Check("Diversity", "open", "Not measured yet.")
    ratio = means[1] / means[0]
    limit = percent(DIVERSITY)
    text = f"{title} replies keep {percent(ratio)} of the SFT replies' distinct bigrams (alarm below {limit})."
    return Check("Diversity", "alarm" if ratio < DIVERSITY else "ok", text)


def _repetition(results: dict, title: str) -> Check:
    figure, name = results.get("most_common_reply/policy"), "Repetition"
    if not figure or figure["mean"] is None:
        return Check(name, "open", "Not measured yet.")
    prompts = round(figure["mean"] * figure["n"])
    if prompts < 2:  # with few prompts even a reply given once has a large share
        return Check(name, "ok", f"No {title} reply is given twice.")
    share, limit = percent(figure["mean"]), percent(REPETITION)
    text = f"The most common {title} reply answers {prompts} of {figure['n']} prompts, {share} (alarm above {limit})."
    return Check(name, "alarm" if figure["mean"] > REPETITION else "ok", text)


def _length(results: dict, title: str) -> Check:
    means = _both(results, "response_length")
    if means is None or min(means) <= 0:
        return Check("Length", "open", "Not measured yet.")
    ratio = means[1] / means[0]
    change = percent(abs(ratio - 1)) + (" longer" if ratio > 1 else " shorter")
    tokens = f"{number(means[1])} tokens against {number(means[0])}"
    text = f"{title} replies are {change} than SFT replies, {tokens} (alarm beyond a factor of {LENGTH})."
    return Check("Length", "alarm" if not 1 / LENGTH <= ratio <= LENGTH else "ok", text)


def _reward_model(normalisation: dict | None, calibrated: bool) -> Check:
    name, pairs = "Reward model", (normalisation or {}).get("validation_pairs")
    if normalisation is None:
        return Check(name, "open", "Not measured yet.")
    if not pairs:
        return Check(name, "open", "No labels were held out, so nothing says how well it generalises.")
    loss, scale = normalisation["validation_loss"], normalisation["scale"]
    accuracy = wilson_ci(round(normalisation["validation_accuracy"] * pairs), pairs)
    text = f"Right on {with_interval(accuracy, percent)} of {count(pairs, 'held-out pair')}"
    text += f", with loss {loss:.3f} against {math.log(2):.3f} by chance"
    text += f"; calibration then scaled its rewards by {scale:.2f}" if calibrated else ""
    ignorant = accuracy["ci95"][0] <= 0.5 or (scale < SCALE if calibrated else loss >= math.log(2))
    return Check(name, "alarm" if ignorant else "ok", text + (": no better than chance." if ignorant else "."))


def _training(run: RunData) -> Check:
    """What the iterations of RL have raised: alarms, updates left out, responses without a score."""
    name, lines = "RL training", run.metrics["rl"]
    if not lines:
        return Check(name, "open", "Not measured yet.")
    fields = [field.name for field in dataclasses.fields(AlarmsConfig)]
    limits = AlarmsConfig(*(run.config.get(f"rl.alarms.{field}", 0.0) for field in fields))
    first: dict[str, str] = {}
    for line in lines:
        for metric, text in alarms(line, limits).items():
            first.setdefault(metric, f"From step {line['step']}: {text}.")
    skipped = sum(lines[-1].get(f"{part}skipped_updates") or 0 for part in ("", "value/"))
    unscored = max(line.get("reward/unscored") or 0 for line in lines)
    notes = [f"{skipped:.0f} updates were left out, not being finite."] if skipped else []
    notes += [f"Up to {percent(unscored)} of an iteration's responses had no score."] if unscored else []
    if first:
        return Check(name, "alarm", " ".join([*first.values(), *notes]))
    text = "No iteration reached an alarm of rl.alarms."
    return Check(name, "note" if notes else "ok", " ".join([text, *notes]))


def _judge(run: RunData) -> Check:
    name, measured = "Judge", (run.audit or {}) | (run.results or {})
    figure = next(filter(None, map(measured.get, ("judge_agreement/ground_truth", "judge_agreement/human"))), None)
    if not measured and not run.people_labelled:
        return Check(name, "open", "Not measured yet.")
    if not figure or figure["mean"] is None:
        return Check(
            name, "open", "Nothing to hold it against: no pair has a better reply by a ground truth or people."
        )
    better = "reply that people prefer" if figure is measured.get("judge_agreement/human") else "good reply"
    text = f"It sides with the {better} on {with_interval(figure, percent)} of {count(figure['n'], 'such pair')}"
    ignorant, slot = figure["ci95"][0] <= 0.5, measured.get("same_slot_in_both_orders")
    if ignorant:
        return Check(name, "alarm", f"{text}: no better than chance.")
    if slot and slot["mean"] is not None and slot["mean"] > SAME_SLOT:
        text += (
            f". But it names the same slot in both orders on {percent(slot['mean'])} of the pairs (note above "
            f"{percent(SAME_SLOT)}): a label is what their mean leaves"
        )
        return Check(name, "note", f"{text}.")
    return Check(name, "ok", f"{text}.")


def _failures(name: str, manifest: dict | None, run: RunData) -> Check:
    if manifest is None:
        return Check(name, "open", "None yet.")
    status, rows = manifest["status"], manifest["rows"]
    failed = {kind: n for kind, n in status.items() if kind not in ("ok", "identical")}
    identical = status.get("identical", 0)
    ties = f" {count(identical, 'pair')} had two equal replies, which nothing can tell apart." if identical else ""
    if not failed:
        return Check(name, "ok", f"All of {count(rows - identical, 'pair')} could be scored.{ties}")
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(failed.items()))
    limit = run.config.get("judge.max_failure_rate", 0.0)
    above = sum(failed.values()) / rows > limit
    text = f"{sum(failed.values())} of {count(rows, 'pair')} could not be scored ({kinds}) and count for nothing.{ties}"
    return Check(name, "alarm" if above else "note", text)
