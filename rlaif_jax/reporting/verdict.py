"""The verdict of a run in plain words: did training improve the replies, and what speaks against believing it?"""

import dataclasses

from rlaif_jax.evaluation.statistics import Figure, difference
from rlaif_jax.reporting.checks import Check, run_checks
from rlaif_jax.reporting.read import RunData
from rlaif_jax.reporting.words import percent, points, with_interval

# By what the judge prefers and how the ground truth moved; "none" where there is no ground truth. What has trained the
# policy stands for {by}.
_HEADINGS = {
    ("policy", "up"): ("good", "{by} improved the replies"),
    ("policy", "none"): ("good", "The judge prefers the {title} replies"),
    ("policy", "unclear"): ("mixed", "The judge prefers the {title} replies; the ground truth does not confirm it"),
    ("policy", "down"): ("bad", "The judge prefers the {title} replies, but by the ground truth they got worse"),
    ("neither", "up"): (
        "mixed",
        "The judge shows no preference, though by the ground truth {by} improved the replies",
    ),
    ("neither", "none"): ("unclear", "No difference between {title} and SFT is shown"),
    ("neither", "unclear"): ("unclear", "No difference between {title} and SFT is shown"),
    ("neither", "down"): (
        "bad",
        "The judge shows no preference, and by the ground truth {by} made replies worse",
    ),
    ("sft", "up"): ("mixed", "The judge prefers the SFT replies, though by the ground truth {by} improved them"),
    ("sft", "none"): ("bad", "The judge prefers the SFT replies: {by} made them worse"),
    ("sft", "unclear"): ("bad", "The judge prefers the SFT replies; the ground truth does not confirm it"),
    ("sft", "down"): ("bad", "{by} made the replies worse"),
}
_SIDES = {
    "policy": "The 95% interval lies above 50%.",
    "neither": "The 95% interval holds 50%: the judge may as well have no preference.",
    "sft": "The 95% interval lies below 50%.",
}
_TRUTHS = {
    "up": "The interval of the difference lies above 0.",
    "unclear": "The interval of the difference holds 0: that may be chance.",
    "down": "The interval of the difference lies below 0.",
}
_AGREES = {("policy", "up"), ("sft", "down"), ("neither", "unclear")}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What stands at the top of the page."""

    tone: str  # "good", "mixed", "bad", "unclear", or "open" where there are no results
    heading: str
    sentences: list[str]
    win: Figure | None  # the win rate, where the judge scored any pair
    checks: list[Check]

    @property
    def alarms(self) -> int:
        """How many checks raised one."""
        return sum(check.level == "alarm" for check in self.checks)


def judge(run: RunData) -> Verdict:
    """The verdict on a run; an open one while there are no results."""
    checks = run_checks(run)
    win = (run.results or {}).get("win_rate/policy_vs_sft")
    if run.results is None:
        return Verdict("open", "No verdict yet", ["The eval stage has not finished."], None, checks)
    if not win or win["mean"] is None:
        return Verdict("open", "No verdict", ["The judge could score none of the evaluation pairs."], None, checks)
    side, truth = preferred(win), ground_truth(run.results)
    direction = "none" if truth is None else _direction(truth)
    tone, heading = _HEADINGS[side, direction]
    between = run.results.get("win_rate/policy_vs_sl_cai")  # what came before RL has its part in what came of both
    heading = heading.format(title=run.title, by=f"SL-CAI and {run.title}" if between else run.title)
    sentences = [_win_sentence(run, win, side), _truth_sentence(run, truth, side)]
    if between and between["mean"] is not None:
        sentences.append(
            f"Since SL-CAI: {run.title} replies are preferred to SL-CAI replies on {with_interval(between, percent)}. "
            f"{_SIDES[preferred(between)]}"
        )
    if run.config.get("judge.shuffle_weights"):
        tone, heading = _control(run, side, direction)
        sentences.append(
            "The judge's weights were shuffled: its labels and its win rate carry no information, and alarms about "
            "judge and reward model are to be expected."
        )
    verdict = Verdict(tone, heading, sentences, win, checks)
    if verdict.alarms and tone == "good":
        raised = "an alarm" if verdict.alarms == 1 else f"{verdict.alarms} alarms"
        return dataclasses.replace(verdict, tone="mixed", heading=f"{heading}, with {raised}")
    return verdict


def preferred(win: Figure) -> str:
    """Whom the judge prefers beyond chance: "policy", "sft" or "neither"."""
    low, high = win["ci95"]
    return "policy" if low > 0.5 else "sft" if high < 0.5 else "neither"


def ground_truth(results: dict) -> Figure | None:
    """How far the share of good replies moved from SFT to the trained policy; None where it is not known."""
    sft, trained = (results.get(f"ground_truth_good/{name}") for name in ("sft", "policy"))
    if not sft or not trained or None in (sft["mean"], trained["mean"]):
        return None
    return difference(trained, sft)


def _direction(change: Figure) -> str:
    low, high = change["ci95"]
    return "up" if low > 0 else "down" if high < 0 else "unclear"


def _control(run: RunData, side: str, direction: str) -> tuple[str, str]:
    if direction == "up":
        return "bad", "The negative control failed: by the ground truth the replies improved"
    if direction == "down":
        return "unclear", "Negative control: by the ground truth the replies got worse"
    if direction == "none" and side == "policy":
        return "unclear", f"Negative control: the shuffled judge prefers the {run.title} replies"
    return "unclear", "Negative control: nothing improved, as it should be"


def _win_sentence(run: RunData, win: Figure, side: str) -> str:
    return (
        f"{run.title} replies are preferred to SFT replies on {with_interval(win, percent)} of held-out prompts, "
        f"n = {win['n']}. {_SIDES[side]}"
    )


def _truth_sentence(run: RunData, change: Figure | None, side: str) -> str:
    if change is None:
        return "This run has no ground truth: the verdict is the judge's alone."
    sft, trained = (with_interval(run.results[f"ground_truth_good/{name}"], percent) for name in ("sft", "policy"))
    direction = _direction(change)
    start = "The ground truth agrees" if (side, direction) in _AGREES else "The ground truth differs"
    if direction == "unclear" and side != "neither":
        start = "The ground truth does not confirm it"
    return (
        f"{start}: {sft} of the SFT replies are good, and {trained} of the {run.title} replies, a difference of "
        f"{with_interval(change, points)} points. {_TRUTHS[direction]}"
    )
