"""The page: what each section shows, in the order of reading, rendered with everything it needs inside."""

import base64
import hashlib
import itertools
import math
import shlex

import jinja2
from etils import epath
from markupsafe import Markup

from rlaif_jax.evaluation.frontier import frontiers, is_of_revisions
from rlaif_jax.evaluation.names import BY_POLICY, SINGLE, stage_and_iteration
from rlaif_jax.evaluation.statistics import Figure, difference
from rlaif_jax.reporting import charts
from rlaif_jax.reporting.audit_page import audit_rows
from rlaif_jax.reporting.calibration import calibrate, probabilities
from rlaif_jax.reporting.principles import principle_section
from rlaif_jax.reporting.read import RunData
from rlaif_jax.reporting.samples import sample_cards
from rlaif_jax.reporting.verdict import judge
from rlaif_jax.reporting.words import count, figure_cell, fixed, interval, number, percent, points
from rlaif_jax.stages.folders import in_round, name_in_round

_FOLDER = epath.Path(__file__).parent
_STAGE_TITLES = {
    "sft": "SFT",
    "critique": "Critique and revision",
    "sl_cai": "SL-CAI",
    "label": "Labels",
    "reward_model": "Reward model",
    "best_of_n": "Best-of-n",
    "preference": "Preference optimisation",
    "rl": "RL",
    "eval": "Evaluation",
    "overoptimisation": "Over-optimisation",
}
# Of each stage: metric, and the level that knowing nothing would reach.
_CURVES = {
    "sft": (("loss", None),),
    "sl_cai": (("loss", None),),
    "reward_model": (("loss", math.log(2)), ("accuracy", 0.5), ("margin", None)),
    "best_of_n": (("loss", None),),
    "preference": (
        ("loss", None),
        ("rewards/accuracies", 0.5),
        ("rewards/margins", None),
        ("rewards/chosen", None),
        ("rewards/rejected", None),
        ("unscored", None),
    ),
    "rl": (
        ("reward/mean", None),
        ("kl/sequence", None),
        ("entropy", None),
        ("response_length", None),
        ("clip_fraction", None),
        ("ended_fraction", None),
        ("loss", None),
        ("value/loss", None),
    ),
}
_NOT_SHARES = ("reward", "harmless_rating", "helpful_rating", "response_length", "kl", "entropy", "distinct_2")


def render(run: RunData) -> str:
    """The HTML of a run's report, in ASCII, so that it reads the same under any encoding."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    style, script = ((_FOLDER / name).read_text() for name in ("report.css", "report.js"))
    verdict = judge(run)
    html = environment.get_template("report.html.j2").render(
        run=run,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        verdict=verdict,
        stages=[(name, _STAGE_TITLES[name], run.stages[name], _progress(run, name)) for name in run.planned],
        later=_later(run),
        commands={name: _command(run, name) for name in _STAGE_TITLES},
        by_policy=_by_policy(run.results or {}, list(run.policies)),
        single=_single(run.results or {}, run.title, list(run.measured_policies)),
        harmlessness=_harmlessness(run),
        revised=_revised(run.critique or {}),
        curves=[
            (name, _STAGE_TITLES[name], _curves(name, run.metrics[name])) for name in _CURVES if name in run.planned
        ],
        frontier=_frontier(run.metrics["rl"]),
        calibration=_calibration(run),
        audit=_audit(run),
        principles=run.by_principle and principle_section(run.by_principle, _audited(run)),
        samples=sample_cards(run),
        by_round=run.by_round and base64.b64encode(run.by_round.encode()).decode(),
        provenance=_provenance(run),
    )
    return html.encode("ascii", "xmlcharrefreplace").decode()


def _command(run: RunData, stage: str) -> str:
    """What runs a stage, and the ones before it that it still needs."""
    order = list(run.planned)
    if stage not in order:
        return ""
    needed = [name for name in order[: order.index(stage)] if run.stages[name] != "done"] + [stage]
    return f"{_main(run)} --stages={','.join(name_in_round(name, run.round) for name in needed)}"


def _main(run: RunData) -> str:
    return f"python -m rlaif_jax.main --config=configs/NAME.py --workdir={shlex.quote(run.path)}"


def _later(run: RunData) -> dict | None:
    """Of a run whose later rounds have not been gone through: how far the next one is, and what goes on with it."""
    left = [name for name, state in run.later.items() if state != "done"]
    if not left or run.stages["eval"] != "done":  # the page says what is missing of its own round
        return None
    number, rounds = in_round(left[0])[1], run.config["rounds"]
    if left == ["rounds"]:
        text = f"The comparison of the rounds: {run.later['rounds']}."
    else:
        states = [
            f"{_STAGE_TITLES[stage]} {run.later[name]}"
            for stage in run.planned
            if (name := name_in_round(stage, number)) in run.later
        ]
        text = f"Round {number} of {rounds}: {', '.join(states)}. What follows is of round {run.round}."
    return {"text": text, "command": _main(run)}


def _progress(run: RunData, stage: str) -> str:
    steps = run.config.get(f"{stage}.steps")
    if lines := run.metrics.get(stage):
        done = len(lines)
        text = count(done, "step") if done == steps or steps is None else f"{done} of {count(steps, 'step')}"
        return text + (_examples(run, run.sl_cai) if stage == "sl_cai" and run.sl_cai else "")
    if stage == "label" and run.labels is not None:
        return count(len(run.labels), "pair")
    if stage == "eval" and run.samples is not None:
        return count(len(run.samples), "prompt")
    return ""


def _examples(run: RunData, found: dict) -> str:
    """What SL-CAI has learned, and what the config asks for."""
    revisions, shown = (count(found[f"sl_cai_{name}s"], name) for name in ("revision", "demonstration"))
    share, wanted = found["sl_cai_helpful_share"], run.config.get("sl_cai.helpful_share")
    asked = "" if wanted is None else f", of {percent(wanted)} asked for"
    return f" on {revisions} and {shown} ({percent(share)}{asked})"


def _change(name: str, change: Figure, scale: float) -> dict:
    form = points if _is_share(name) else fixed(scale)
    sign = "+" if form is not points and change["mean"] > 0 else ""
    return {"mean": sign + form(change["mean"]), "interval": interval(change, form)}


def _is_share(name: str) -> bool:
    return name.split("/")[0] not in _NOT_SHARES


def _by_policy(results: dict, policies: list[str]) -> list[dict]:
    """A row a figure that the policies have; ones without a name for people come last, under their own."""
    known = dict((name, label) for label, name in BY_POLICY)
    found = [name.removesuffix("/policy") for name in results if name.endswith("/policy")]
    names = [name for name in known if name in found] + [name for name in found if name not in known]
    rows = []
    for name in names:
        sft, trained = results.get(f"{name}/sft"), results[f"{name}/policy"]
        if sft and None not in (sft["mean"], trained["mean"]):
            label, change = known.get(name, name), difference(trained, sft)
            low, high = change["ci95"]
            rows.append({
                "label": label.strip(),
                "part": label.startswith(" "),
                "cells": [figure_cell(_is_share(name), results[f"{name}/{policy}"]) for policy in policies],
                "change": _change(name, change, sft["mean"]),
                "excludes_zero": low > 0 or high < 0,
                "n": trained["n"],
            })  # fmt: skip
    return rows


def _single(results: dict, title: str, policies: list[str]) -> list[dict]:
    known = dict((name, label.format(title=title)) for label, name in SINGLE)
    elsewhere = {f"{name}/{policy}" for name in _paired(results) for policy in policies}
    # Policies that RL was on its way are points of the frontier alone: they may be many.
    elsewhere |= {f"kl/{policy}_vs_sft" for policy in policies if stage_and_iteration(policy)[1]}
    found = [
        name
        for name, figure in results.items()
        if isinstance(figure, dict) and name not in elsewhere and not is_of_revisions(name)
    ]
    names = [name for name in known if name in found] + [name for name in found if name not in known]
    return [
        {
            "label": known.get(name, name).strip(),
            "part": known.get(name, "").startswith(" "),
            "value": figure_cell(_is_share(name), results[name]),
            "n": results[name]["n"],
        }
        for name in names
    ]


def _paired(results: dict) -> set[str]:
    return {name.removesuffix("/policy") for name in results if name.endswith("/policy")}


def _series(lines: list[dict], *names: str) -> list[tuple[float, ...]]:
    """The finite values of some metrics, where a line has all of them."""
    rows = [tuple(line.get(name) for name in names) for line in lines]
    return [row for row in rows if all(isinstance(x, (int, float)) and math.isfinite(x) for x in row)]


def _curves(stage: str, lines: list[dict]) -> list[dict]:
    shown = []
    for name, chance in (*_CURVES[stage], *((name, None) for name in _by_principle(lines))):
        series = _series(lines, "step", name)
        if series:
            steps, values = zip(*series, strict=True)
            chart = charts.curve(f"{stage}: {name}", steps, values, chance)
            shown.append({"name": name, "last": number(values[-1]), "chance": chance is not None, "chart": chart})
    return shown


def _by_principle(lines: list[dict]) -> list[str]:
    """The metrics that each principle's part of the reward has."""
    return sorted({name for line in lines for name in line if name.startswith("reward/principle")})


def _frontier(lines: list[dict]) -> Markup | None:
    series = _series(lines, "kl/sequence", "reward/mean")
    return charts.reward_against_kl(*zip(*series, strict=True)) if series else None


def _harmlessness(run: RunData) -> list[dict]:
    """Helpfulness against harmlessness: charts, each with its table."""
    return [
        {
            "title": f"Over {each.over}, by {each.by}",
            "chart": charts.frontier(f"frontier over {each.over}, by {each.by}", each.points),
            "rows": [
                (point.name, [(figure_cell(False, side), side["n"]) for side in point[1:]]) for point in each.points
            ],
        }
        for each in frontiers((run.critique or {}) | (run.results or {}), run.measured_policies)
    ]


def _revised(figures: dict) -> list[dict]:
    """Of critique and revision, what failed and what changed in each round, and under each principle."""
    tables = []
    for head, part in (("Round", ""), ("Principle", "_by_principle")):
        names = [name.partition("/")[2] for name in figures if name.startswith(f"critique_failed{part}/")]
        shown = {name: [figures[f"critique_{what}{part}/{name}"] for what in ("failed", "changed")] for name in names}
        rows = [
            (name.removeprefix("revision_"), [figure_cell(True, figure) for figure in each], each[0]["n"])
            for name, each in shown.items()
        ]
        tables += [{"head": head, "rows": rows}] if rows else []
    return tables


def _calibration(run: RunData) -> dict | None:
    """The judge's probabilities on the training pairs."""
    if not run.labels or run.people_labelled or not (values := probabilities(run.labels)):
        return None
    found = calibrate(run.labels, run.ground_truth) if run.ground_truth else None
    shown = {"histogram": charts.histogram(values), "pairs": len(values), "reliability": None}
    if found:
        low, high = found.accuracy["ci95"]
        shown |= {
            "reliability": charts.reliability(found),
            "n": found.n,
            "group": _group([bin_.good["n"] for bin_ in found.bins]),
            "confidence": percent(found.confidence),
            "accuracy": percent(found.accuracy["mean"]),
            "lean": "less sure than it could be" if found.confidence < low else
                    "surer than it should be" if found.confidence > high else "about as sure as it should be",
        }  # fmt: skip
    return shown


def _group(sizes: list[int]) -> str:
    """Of equal-count bins, whose sizes differ by one at most."""
    return f"a group of {' or '.join(map(str, sorted(set(sizes))))} pairs"


def _audit(run: RunData) -> list[dict]:
    return audit_rows(_audited(run))


def _audited(run: RunData) -> dict:
    """The figures of the labels that are trained on."""
    return {name: figure for name, figure in (run.audit or {}).items() if not name.startswith("people/")}


def _provenance(run: RunData) -> dict:
    groups = itertools.groupby(run.config.items(), key=lambda item: item[0].split(".")[0])
    manifest = run.label_manifest or {}
    return {
        "facts": [
            ("git commit", run.record.get("git_commit") or "unknown"),
            ("devices", ", ".join(f"{n} x {kind}" for kind, n in _counted(run.record.get("devices", [])))),
            ("Python", run.record.get("python", "unknown")),
            *((f"labelling {name.replace('_', ' ')}", manifest[name]) for name in
              ("judge", "judge_hash", "template", "template_hash") if name in manifest),
        ],
        "packages": list(run.record.get("packages", {}).items()),
        "config": [(group, list(items)) for group, items in groups],
    }  # fmt: skip


def _counted(items: list[str]) -> list[tuple[str, int]]:
    return [(item, items.count(item)) for item in dict.fromkeys(items)]
