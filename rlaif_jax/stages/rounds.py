"""What comes of rounds in which each policy makes the pairs that the next one learns from.

Gold beside proxy, where they are not one judge, diversity and the labels' agreement, round by round: a judge that
learns with its policy may come to praise what nobody else does, and a policy fed on its own replies may narrow
(Shumailov et al., arXiv 2305.17493).
"""

import functools
from collections.abc import Sequence

import numpy as np

from rlaif_jax.evaluation.audit import agreement
from rlaif_jax.evaluation.names import by_role
from rlaif_jax.evaluation.statistics import Figure, mean_ci
from rlaif_jax.files import read_json, read_parquet, write_json, write_text
from rlaif_jax.judge.constitution import Principle
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.reporting.rounds import draw_rounds
from rlaif_jax.stages.evaluate import wins
from rlaif_jax.stages.panel import labeller
from rlaif_jax.stages.principles import comparison_principles, evaluation_draws
from rlaif_jax.stages.run import Run


def run_rounds(run: Run) -> None:
    """Reads every round's labels and evaluation; writes `rounds/roundK/` judgements, `results.json`, `rounds.svg`.

    `results.json` has the last round's figures under their own names, and each round's as NAME/roundK.
    """
    folder, policy = run.folder("rounds"), run.config.policy_stage
    results = dict(read_json(run.in_round(run.config.rounds).folder("eval") / "results.json"))
    by_round: dict[str, Figure] = {}
    principles = comparison_principles(run, "rounds")
    for number in range(1, run.config.rounds + 1):
        found = read_json(run.in_round(number).folder("eval") / "results.json")
        if number == 1:
            by_round |= {_named(name, "sft", 0): figure for name, figure in found.items() if name.endswith("/sft")}
        trained = {name: figure for name, figure in by_role(found, policy).items() if "/policy" in name}
        trained |= _labels(run, number)
        if run.config.panel.judges or run.config.label.principles == "ensemble":  # else who labels is who evaluates
            trained |= _proxy(run, number, principles)
        by_round |= {_named(name, "policy", number): figure for name, figure in trained.items()}
    write_json(folder / "results.json", results | by_round)
    write_text(folder / "rounds.svg", draw_rounds({run.workdir.name: by_round}))


def _named(name: str, policy: str, number: int) -> str:
    return name.replace(f"/{policy}", f"/round{number}")


def _labels(run: Run, number: int) -> dict[str, Figure]:
    """How far the labels that a round learned from agree with the ground truth, where there is one."""
    audit = read_json(run.in_round(number).folder("label") / "audit.json")
    found = audit.get("judge_agreement/ground_truth")
    return {"label_agreement/policy": found} if found else {}


def _proxy(run: Run, number: int, principles: Sequence[Principle]) -> dict[str, Figure]:
    """What those who would label the next round say of a round's policy: kept in `rounds/roundK/`.

    `proxy_win_rate` is to them what `win_rate` is to the judge that evaluates, of the same replies; `judge_agreement`
    is how often the two prefer the same one. Where both judge under principles, a pair has the same for both.
    """
    folder, evaluation = run.folder("rounds") / f"round{number}", run.in_round(number).folder("eval")
    judged = read_parquet(evaluation / "preferences.parquet").to_pylist()
    pairs = [Pair(row["prompt"], row["response_a"], row["response_b"]) for row in judged]
    label = labeller(run.in_round(number + 1), principles, evaluation_draws(run))
    label(pairs, folder, f"round {number}")
    labelled = read_parquet(folder / "preferences.parquet").to_pylist()
    mean = functools.partial(mean_ci, resamples=run.config.evaluation.bootstrap_samples, seed=run.config.seed)
    win = wins(labelled)
    both = [i for i, rows in enumerate(zip(judged, labelled, strict=True)) if {row["status"] for row in rows} == {"ok"}]
    prob_a, gold = (np.array([rows[i]["prob_a"] for i in both], float) for rows in (labelled, judged))
    return {
        "proxy_win_rate/policy_vs_sft": mean(win[np.isfinite(win)]),
        "judge_agreement/policy": mean(agreement(prob_a, gold)),
    }
