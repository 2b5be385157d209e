"""How harmless and how helpful replies are, each rated by itself, and how evasive: of policies and of revisions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.refusals import refusal
from rlaif_jax.evaluation.statistics import Figure
from rlaif_jax.files import read_parquet, remove_folder, there, write_parquet
from rlaif_jax.judge.prompts import PromptConfig
from rlaif_jax.judge.score import Judge, load_judge, rate
from rlaif_jax.stages.critique import texts
from rlaif_jax.stages.run import Run
from rlaif_jax.stages.values import keep_values

_KINDS = ("harmless", "helpful")


class _Texts(NamedTuple):
    """What a policy replied, or one step of critique and revision made of its replies."""

    prompts: Sequence[str]
    responses: Sequence[str]
    asked: Mapping[str, np.ndarray]  # kind of rating -> which of them are rated: [n] bool


def harmlessness(
    run: Run, samples: Mapping[str, list], groups: np.ndarray, mean: Callable[..., Figure]
) -> dict[str, Figure]:
    """Reads policies' replies and revisions; writes `eval/ratings.parquet`, and returns its figures.

    samples: `prompt` and each policy's replies; groups: of the prompts, [n] text. Of a run without red-team prompts and
    without prompts to rate by there are no figures.
    """
    config = run.config.evaluation
    known = sorted(set(groups.tolist()))
    if unknown := sorted(set(config.red_team_groups) - set(known)):
        raise UserError(
            f"config.evaluation.red_team_groups: no held-out prompt is of the group {unknown[0]!r}; the groups are "
            f"{', '.join(map(repr, known))}"
        )
    red_team = np.array([group in config.red_team_groups for group in groups], bool)
    if not (red_team.any() or config.harmless_prompt.template or config.helpful_prompt.template):
        return {}
    # Harmlessness is for prompts that put it to the test, evasiveness and helpfulness for the others.
    safe = ~red_team
    asked = {"harmless": red_team if red_team.any() else safe, "helpful": safe}
    texts = {name: _Texts(samples["prompt"], samples[name], asked) for name in run.config.measured_policies}
    steps = _revisions(run)
    ratings = _ratings(run, texts | steps)
    figures: dict[str, Figure] = {}
    for name in (*texts, *steps):
        refused = ratings[name]["refused"]
        if name in texts:
            figures[f"refusal_rate/{name}"] = mean(refused[safe])
        if name in steps or red_team.any():
            figures[f"refusal_rate_red_team/{name}"] = mean(refused if name in steps else refused[red_team])
        for kind in (kind for kind in _KINDS if kind in ratings[name]):
            known = ratings[name][kind][np.isfinite(ratings[name][kind])]
            figures |= {f"{kind}_rate/{name}": mean(known > 0), f"{kind}_rating/{name}": mean(known)}
    return figures | _ground_truth(run, texts, red_team, mean)


def _revisions(run: Run) -> dict[str, _Texts]:
    """The first replies that the stage critique has revised, and what they are after each round."""
    file, limit = run.folder("critique") / "revisions.parquet", run.config.evaluation.rated_revisions
    if not limit or not there(file):
        return {}
    rows = read_parquet(file).slice(0, limit).to_pylist()
    every = dict.fromkeys(_KINDS, np.ones(len(rows), bool))
    steps = zip(*map(texts, rows), strict=True)
    names = (f"revision_{i}" if i else "first" for i in range(1 + len(rows[0]["rounds"])))
    return {name: _Texts([row["prompt"] for row in rows], step, every) for name, step in zip(names, steps, strict=True)}


def _ratings(run: Run, texts: Mapping[str, _Texts]) -> dict[str, dict[str, np.ndarray]]:
    """Of each of them `refused` [n] bool and, by kind, the ratings from -1 to 1 or NaN: [n] float64."""
    folder = run.folder("eval")
    file, kinds = folder / "ratings.parquet", [kind for kind in _KINDS if _prompt(run, kind).template]
    if not there(file):
        write_parquet(file, _rate(run, texts, kinds))
    for kind in kinds:
        remove_folder(_shards(run, kind))
    rows = read_parquet(file)
    of, refused = np.array(rows["of"]), np.array(rows["refusal"]) == "refusal"
    columns = {"refused": refused} | {kind: np.array(rows[kind].to_pylist(), float) for kind in kinds}
    return {name: {column: values[of == name] for column, values in columns.items()} for name in texts}


def _rate(run: Run, texts: Mapping[str, _Texts], kinds: Sequence[str]) -> pa.Table:
    """A row a text, with the judge's ratings; one that a text is not asked for, or does not get, is null."""
    prompts, responses = ([x for each in texts.values() for x in each[i]] for i in (0, 1))
    table = {
        "of": [name for name, each in texts.items() for _ in each.prompts],
        "prompt": prompts,
        "response": responses,
        "refusal": list(map(refusal, responses)),
    }
    for kind in kinds:
        asked = np.flatnonzero(np.concatenate([each.asked[kind] for each in texts.values()]))
        ratings = np.full(len(prompts), np.nan)
        ratings[asked] = _rated(run, kind, [prompts[row] for row in asked], [responses[row] for row in asked])
        table[kind] = pa.array(ratings, from_pandas=True)
    return pa.table(table)


def _rated(run: Run, kind: str, prompts: list[str], responses: list[str]) -> list[float]:
    """The judge's ratings of `kind`; NaN for a text that is too long for it."""

    @functools.cache
    def judge() -> Judge:  # not loaded where all ratings are there
        return load_judge(
            dataclasses.replace(run.config.judge, prompt=_prompt(run, kind)), run.config.seed, run.judge_placement
        )

    def compute(rows: list[int]) -> dict[str, np.ndarray]:
        return {kind: rate(judge(), [prompts[row] for row in rows], [responses[row] for row in rows])}

    commit_every = run.config.evaluation.commit_every
    return keep_values(compute, [kind], len(prompts), _shards(run, kind), commit_every)[kind]


def _prompt(run: Run, kind: str) -> PromptConfig:
    return getattr(run.config.evaluation, f"{kind}_prompt")


def _shards(run: Run, kind: str) -> epath.Path:
    """Where ratings are kept until all are there."""
    return run.folder("eval") / f"ratings_{kind}"


def _ground_truth(
    run: Run, texts: Mapping[str, _Texts], red_team: np.ndarray, mean: Callable[..., Figure]
) -> dict[str, Figure]:
    """What a ground truth that knows harm says of the policies, each side where it is asked for."""
    truth, figures = run.ground_truth(), {}
    if not truth or not red_team.any():
        return {}
    for name, each in texts.items():
        grades = list(map(truth.grades, each.prompts, each.responses))
        for grade, part, rows in (("answers_prompt", "safe", ~red_team), ("harmless", "red_team", red_team)):
            if grade in grades[0]:
                values = np.array([row[grade] for row in grades])
                figures[f"ground_truth_{grade}_{part}/{name}"] = mean(values[rows])
    return figures
