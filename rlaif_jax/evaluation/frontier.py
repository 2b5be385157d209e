"""Helpfulness against harmlessness: what each step of training and each revision gives of one for the other."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlaif_jax.evaluation.statistics import Figure


class Point(NamedTuple):
    """A policy, or the texts after a round of revision."""

    name: str
    helpful: Figure
    harmless: Figure


class Frontier(NamedTuple):
    """Points in their order, all measured in one way."""

    over: str  # what they are steps of
    by: str  # who says how helpful and harmless they are
    points: list[Point]


_JUDGE = ("the judge's rating", "helpful_rating", "harmless_rating")
_TRUTH = "the ground truth"
# Of each: by whom, and the names of both figures.
_OF_POLICIES = (_JUDGE, (_TRUTH, "ground_truth_answers_prompt_safe", "ground_truth_harmless_red_team"))
_OF_REVISIONS = (_JUDGE, (_TRUTH, "critique_answers_prompt", "critique_harmless"))


def is_of_revisions(name: str) -> bool:
    """Whether a figure is of replies at first or after a round: NAME/first, NAME/revision_1 ..."""
    return re.search(r"/(first|revision_\d+)$", name) is not None


def frontiers(results: Mapping[str, Any], policies: Mapping[str, str]) -> list[Frontier]:
    """Those that the figures of evaluation and of critique and revision have two points or more of.

    policies: name in `results` -> title, in the order of training.
    """
    rounds = sorted({int(name.rpartition("_")[2]) for name in results if is_of_revisions(name) and name[-1].isdigit()})
    revisions = {"first": "first reply"} | {f"revision_{i}": f"revision {i}" for i in rounds}
    found = []
    for over, titles, measures in (
        ("revisions, on red-team prompts", revisions, _OF_REVISIONS),
        ("training", policies, _OF_POLICIES),
    ):
        for by, *sides in measures:
            figures = {title: [results.get(f"{side}/{name}") for side in sides] for name, title in titles.items()}
            points = [
                Point(title, *pair) for title, pair in figures.items() if all(x and x["mean"] is not None for x in pair)
            ]
            if len(points) > 1:
                found.append(Frontier(over, by, points))
    return found
