"""The section of an audit page about the principles that pairs were judged under."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlaif_jax.evaluation.principles import PAIR, agreements, names_of
from rlaif_jax.reporting.words import figure_cell

# The columns of the table: the figure of a principle, what it is called, and whether it is a share.
_COLUMNS = {
    "principle_use": ("pairs labelled", True),
    "principle_decisiveness": ("|2p - 1|", False),
    "principle_share_a": ("names A", True),
    "principle_first_slot": ("picks the first slot", True),
    "principle_ground_truth": ("sides with the good reply", True),
    "principle_human": ("sides with people", True),
}


def principle_section(columns: Mapping[str, Sequence[Any]], figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page's template shows of `evaluation.principles.principle_audit`; None where there are no principles.

    columns: those that it read.
    """
    names = names_of(figures)
    if not names:
        return None
    shown = [key for key in _COLUMNS if any(f"{key}/{name}" in figures for name in names)]
    texts = dict(zip(columns["principle"], columns.get("principle_text", columns["principle"]), strict=True))
    together = agreements(figures)
    return {
        "head": [_COLUMNS[key][0] for key in shown],
        "rows": [(name, [_cell(figures, f"{key}/{name}", _COLUMNS[key][1]) for key in shown]) for name in names],
        "names": names,
        "agreement": [
            (one, [figure_cell(True, together[one, other]) if (one, other) in together else None for other in names])
            for one in names
        ]
        if together
        else [],
        "alphas": [
            (label, figure_cell(False, figures[key]))
            for label, key in (("votes", "principle_alpha/votes"), ("probabilities", "principle_alpha/prob_a"))
            if key in figures and figures[key]["mean"] is not None
        ],
        "examples": [
            (name, texts.get(name, ""), [_example(columns, row) for side in "ab" for row in
                                 figures.get(f"principle_surest_{side}/{name}", ())])
            for name in names
        ],
        "disputed": [_disputed(columns, row) for row in figures.get("principle_disputed", ())],
    }  # fmt: skip


def _cell(figures: Mapping[str, Any], name: str, share: bool) -> Any:
    figure = figures.get(name)
    return figure and figure_cell(share, figure)


def _example(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """A pair that a principle decided: the response that it is for, the one that it is against, and how sure it is."""
    prob_a = columns["prob_a"][row]
    better, worse = ("response_a", "response_b") if prob_a > 0.5 else ("response_b", "response_a")
    return {
        "row": row,
        "prompt": columns["prompt"][row],
        "better": columns[better][row],
        "worse": columns[worse][row],
        "sure": f"{max(prob_a, 1 - prob_a):.2f}",
    }


def _disputed(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """A pair, and what each principle says of it."""
    pair = {name: columns[name][row] for name in PAIR}
    said = [
        f"{columns['prob_a'][other]:.2f} by {columns['principle'][other]}"
        for other in range(len(columns["status"]))
        if columns["status"][other] == "ok" and all(columns[name][other] == pair[name] for name in PAIR)
    ]
    return pair | {"row": row, "said": ", ".join(said)}
