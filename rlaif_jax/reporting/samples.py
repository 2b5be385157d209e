"""The sample browser's cards: a held-out prompt, both replies, and what judge and ground truth say of them."""

from rlaif_jax.reporting.read import RunData
from rlaif_jax.reporting.words import number

MAX_SAMPLES = 500  # on a page, so that a phone can open it


def sample_cards(run: RunData) -> list[dict] | None:
    """One card a prompt, in the order of evaluation; None where there are no samples yet."""
    if run.samples is None:
        return None
    rows = run.samples[:MAX_SAMPLES]
    judged = (run.judged or [None] * len(rows))[:MAX_SAMPLES]
    return [_card(run, sample, judgement) for sample, judgement in zip(rows, judged, strict=True)]


def _card(run: RunData, sample: dict, judgement: dict | None) -> dict:
    good = {name: run.ground_truth(sample["prompt"], sample[name]) if run.ground_truth else None
            for name in ("sft", "policy")}  # fmt: skip
    probability = judgement["prob_a"] if judgement and judgement["status"] == "ok" else None
    return {
        "prompt": sample["prompt"],
        "replies": [
            {
                "title": "SFT" if name == "sft" else run.title,
                "text": sample[name],
                "good": good[name],
                "facts": _facts(sample, name),
            }
            for name in ("sft", "policy")
        ],
        "probability": probability,
        "status": judgement["status"] if judgement else "not judged",
        "outcome": _outcome(probability),
        "truth": "" if None in good.values() else {(True, True): "both", (False, False): "neither"}.get(
            (good["sft"], good["policy"]), "policy" if good["policy"] else "sft"),
    }  # fmt: skip


def _facts(sample: dict, name: str) -> str:
    reward = sample.get(f"reward/{name}")  # a run without a reward model has none
    return ("" if reward is None else f"reward {number(reward)}, ") + f"{sample[f'length/{name}']:.0f} tokens"


def _outcome(probability: float | None) -> str:
    if probability is None or probability == 0.5:
        return "none"
    return "policy" if probability > 0.5 else "sft"
