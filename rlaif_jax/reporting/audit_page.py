"""The audit of a label file as a page: what the judge leans to, how far people agree, and what to label next."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from markupsafe import Markup

from rlaif_jax.evaluation.budget import HALF_WIDTHS, label_next, labels_needed
from rlaif_jax.reporting import charts
from rlaif_jax.reporting.calibration import calibration
from rlaif_jax.reporting.principles import principle_section
from rlaif_jax.reporting.words import figure_cell, percent

_FOLDER = epath.Path(__file__).parent
# What is said of the judge, in the order of reading; the rest comes last, under its own name.
_NAMES = {
    "judge_agreement/ground_truth": "sides with the good reply, where exactly one is good",
    "judge_agreement/human": "sides with people",
    "judge_kappa/human": "Cohen's kappa with people",
    "longer_agreement/human": "(the longer response alone sides with people)",
    "first_slot_rate": "picks the reply shown first; 50% without position bias",
    "same_slot_in_both_orders": "picks the same slot whichever reply is in it",
    "first_slot_when_same": "picks the first slot, where it picks the same in both orders",
    "longer_preferred": "prefers the longer reply",
    "length_slope": "log-odds for each 100 characters more",
    "list_preferred": "prefers the reply with a list or other markup, where one has it",
    "self_preferred": "prefers its own reply, where one is",
    "calibration/ece": "expected calibration error",
    "calibration/ece_after_scaling": "expected calibration error at the fitted temperature",
    "calibration/brier": "Brier score",
    "calibration/brier_after_scaling": "Brier score at the fitted temperature",
    "panel_alpha/votes": "Krippendorff's alpha of the panel's votes",
    "panel_alpha/prob_a": "Krippendorff's alpha of the panel's probabilities",
    "panel_disagreement/variance": "variance of the panel's probabilities of a pair",
    "panel_disagreement/vote_entropy": "entropy of the panel's vote on a pair, in nats",
    "answer_mass": "probability that it gives an answer at all",
    "scored": "pairs that could be scored",
}
_NOT_SHARES = ("judge_kappa", "length_slope", "calibration", "panel_alpha", "panel_disagreement")
_IN_TABLES = ("panel_member/", "panel_without/", "principle_")  # of their own
# The columns of the table of a panel: what they are called, and the figure of the whole panel.
_PANEL = {
    "with_others": ("sides with the others", None),
    "ground_truth": ("sides with the good reply", "judge_agreement/ground_truth"),
    "human": ("sides with people", "judge_agreement/human"),
    "alpha/votes": ("alpha, votes", "panel_alpha/votes"),
    "alpha/prob_a": ("alpha, probabilities", "panel_alpha/prob_a"),
}
SHOWN = 12  # pairs to label next


def audit_rows(figures: Mapping[str, Any]) -> list[dict]:
    """A row a figure that has observations: its label, value and n.

    `panel_table` has those of a panel's members, `reporting.principles` those of principles.
    """
    found = {name: figure for name, figure in figures.items() if isinstance(figure, dict)}
    found = {name: figure for name, figure in found.items() if not name.startswith(_IN_TABLES)}
    names = [name for name in _NAMES if name in found] + [name for name in found if name not in _NAMES]
    return [
        {
            "label": _NAMES.get(name, name.removeprefix("judge_agreement/human/")),
            "value": figure_cell(name.split("/")[0] not in _NOT_SHARES, found[name]),
            "n": found[name]["n"],
        }
        for name in names
        if found[name]["mean"] is not None
    ]


def panel_table(figures: Mapping[str, Any]) -> dict | None:
    """The whole panel, each member, and the panel without it: `head`, and `rows` of a label and cells or None.

    None where no panel labelled.
    """
    names = [name.split("/")[1] for name in figures if name.startswith("panel_member/") and name.endswith("/scored")]
    if not names:
        return None
    rows = {"the whole panel": {key: figures.get(whole) for key, (_, whole) in _PANEL.items()}}
    for kind, label in (("member", "{} alone"), ("without", "the panel without {}")):
        for name in names:
            rows[label.format(name)] = {key: figures.get(f"panel_{kind}/{name}/{key}") for key in _PANEL}
    # A figure without observations, or that of another row, is nothing to show.
    shown = [key for key in _PANEL if any((cells[key] or {}).get("mean") is not None for cells in rows.values())]
    return {
        "head": [_PANEL[key][0] for key in shown],
        "rows": [
            (label, [cells[key] and figure_cell("alpha" not in key, cells[key]) for key in shown])
            for label, cells in rows.items()
        ],
    }


def render_audit(
    title: str,
    columns: Mapping[str, Sequence[Any]],
    figures: Mapping[str, Any],
    by_principle: Mapping[str, Sequence[Any]] | None = None,
) -> str:
    """The HTML of an audit of the label file whose columns are given, in ASCII.

    by_principle: the columns with a row for each pair under each principle, where they are others.
    """
    ok = [i for i, status in enumerate(columns["status"]) if status == "ok"]
    prob_a = np.array([columns["prob_a"][i] for i in ok], float)
    human = np.array([np.nan if value is None else value for value in columns.get("human", [])], float)
    said = np.isin(human[ok], (0.0, 1.0)) if len(human) else np.zeros(len(ok), bool)
    # Every other pair the other way round: in some sets a is always the chosen response.
    turned = np.arange(np.sum(said)) % 2 == 1
    pairs = [np.where(turned, 1 - x, x) for x in (prob_a[said], human[ok][said])] if said.any() else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    by = {name: figure for name, figure in figures.items() if name.startswith("judge_agreement/human/")}
    panel = {name: figure for name, figure in figures.items() if name.startswith("panel_")}
    by_itself = {*by, *panel}
    agreement = figures.get("judge_agreement/human")
    html = environment.get_template("audit.html.j2").render(
        title=title,
        style=Markup((_FOLDER / "report.css").read_text()),
        judges=sorted({f"{judge}, {form}" for judge, form in zip(columns["judge"], columns["template"], strict=True)}),
        pairs=len(columns["status"]),
        rows=audit_rows({name: figure for name, figure in figures.items() if name not in by_itself}),
        by=audit_rows(by),
        panel_rows=audit_rows(panel),
        panel=panel_table(figures),
        principles=principle_section(by_principle or columns, figures),
        temperature=figures.get("calibration/temperature"),
        histogram=charts.histogram(prob_a) if len(prob_a) else None,
        reliability=charts.reliability(calibration(*pairs)) if pairs else None,
        compared=int(said.sum()),
        budget=_budget(agreement["mean"] if agreement else None),
        agreement=percent(agreement["mean"]) if agreement else None,
        next=[_pair(columns, row) for row in label_next(columns, SHOWN)],
    )
    return html.encode("ascii", "xmlcharrefreplace").decode()


def _budget(agreement: float | None) -> list[tuple[str, int]]:
    share = 0.5 if agreement is None else agreement  # where nothing is known, the most that any share needs
    return [(f"{100 * half:g}", labels_needed(share, half)) for half in HALF_WIDTHS]


def _pair(columns: Mapping[str, Sequence[Any]], row: int) -> dict:
    names = ("prompt", "response_a", "response_b", "status")
    said = {"when shown first": columns["prob_a_forward"][row], "when shown second": columns["prob_a_reversed"][row]}
    for column in {"prob_a_members", "prob_a_principles"} & {*columns}:
        said = {f"by {name}": value for name, value in (columns[column][row] or {}).items()}
    said = ", ".join(f"{'-' if value is None else f'{value:.2f}'} {how}" for how, value in said.items())
    return {name: columns[name][row] for name in names} | {"row": row, "said": said}
