"""What a report is made of: the files of a run folder, whichever of them there are."""

import dataclasses
import os
import urllib.parse
from collections.abc import Callable

from etils import epath

from rlaif_jax.data import embedded
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.names import (
    POLICY_STAGES,
    by_role,
    measured_policies,
    policies,
    policy_stage,
    policy_titles,
    title,
)
from rlaif_jax.evaluation.principles import Columns, principle_columns
from rlaif_jax.files import read_json, read_json_lines, read_parquet
from rlaif_jax.stages.folders import all_stages, cell_stages, in_round, name_in_round, record_file

# Those of stages/pipeline.py, without JAX.
STAGES = ("sft", "critique", "sl_cai", "label", "reward_model", *POLICY_STAGES, "eval", "overoptimisation")
USUAL = ("sft", "label", "reward_model", "rl", "eval")  # of a run that does not say

# Whether a reply to a prompt is good; None for a prompt that the ground truth does not know.
GroundTruth = Callable[[str, str], bool | None]

_PAIR = ("prompt", "response_a", "response_b", "status", "prob_a", "prob_a_forward", "prob_a_reversed")
_SAMPLE = ("prompt", *(f"{column}{name}" for name in ("sft", "policy") for column in ("", "length/")))
_COUNTS = {"sl_cai_revisions": int, "sl_cai_demonstrations": int, "sl_cai_helpful_share": float}


@dataclasses.dataclass(frozen=True)
class RunData:
    """The contents of a run folder. What a stage has not written is None or empty."""

    path: str  # of the folder, as the user names it
    name: str
    record: dict  # config.json
    round: int  # the last one that has been evaluated; what follows is of it
    by_round: str | None  # rounds/rounds.svg
    stages: dict[str, str]  # name -> "done", "unfinished" or "not run"
    later: dict[str, str]  # the same of the rounds after that one, as `name_in_round`, and of what compares them all
    metrics: dict[str, list[dict]]  # stage -> lines of metrics.jsonl
    labels: list[dict] | None  # label/preferences.parquet
    label_manifest: dict | None
    audit: dict | None
    audit_page: str | None  # where label/audit.html is, from the folder
    by_principle: Columns | None  # of the labels, a row for each pair under each principle
    normalisation: dict | None  # of the reward model
    samples: list[dict] | None  # eval/samples.parquet, with the trained policy called "policy", as in `results`
    judged: list[dict] | None  # eval/preferences.parquet: the trained policy is a, SFT is b
    eval_manifest: dict | None
    results: dict | None
    critique: dict | None  # critique/results.json
    sl_cai: dict | None  # sl_cai/results.json
    ground_truth: GroundTruth | None

    @property
    def planned(self) -> tuple[str, ...]:
        """The stages that the config has."""
        return tuple(self.config.get("stages", USUAL))

    @property
    def policy_stage(self) -> str:
        """The stage that trains the policy which is evaluated."""
        return policy_stage(self.planned)

    @property
    def title(self) -> str:
        """What the trained policy is called."""
        return title(self.config)

    @property
    def policies(self) -> dict[str, str]:
        """The policies that are evaluated, by their names in `results`, and what they are called."""
        return policy_titles(policies(self.planned), self.title)

    @property
    def measured_policies(self) -> dict[str, str]:
        """The same with those that RL has kept on its way."""
        steps, keep_every = (self.config.get(f"rl.{name}", 0) for name in ("steps", "keep_every"))
        return policy_titles(measured_policies(self.planned, steps, keep_every), self.title)

    @property
    def people_labelled(self) -> bool:
        """Whether the labels are comparisons by people, so that no judge stands behind them."""
        return (self.label_manifest or {}).get("judge") == "human"

    @property
    def config(self) -> dict:
        """The resolved config: dotted names and values."""
        return self.record.get("config", {})


def read_run(workdir: epath.Path) -> RunData:
    """Reads a run, finished or not, or a cell of a sweep.

    Raises UserError for a folder that is no run, and for a damaged file.
    """
    record = _object(record_file(workdir), config=dict)
    rounds, shared = record["config"].get("rounds", 1), cell_stages(workdir)
    names = {number: {stage: name_in_round(stage, number) for stage in STAGES} for number in range(1, rounds + 1)}
    all_folders = {
        number: {stage: shared.get(name, workdir / name) for stage, name in each.items()}
        for number, each in names.items()
    }
    evaluated = [number for number, each in all_folders.items() if _state(each["eval"]) == "done"]
    number = max(evaluated, default=1)
    planned = all_stages(record["config"].get("stages", USUAL), rounds)
    later = [name for name in planned if name == "rounds" or in_round(name)[1] > number]
    folders = all_folders[number]
    label, evaluation = folders["label"], folders["eval"]
    by_round = shared.get("rounds", workdir / "rounds") / "rounds.svg"
    policy = policy_stage(record["config"].get("stages", USUAL))
    labels, samples = _rows(label / "preferences.parquet", _PAIR), _samples(evaluation / "samples.parquet", policy)
    results = _figures(evaluation / "results.json")
    results = None if results is None else by_role(results, policy)
    judged = _rows(evaluation / "preferences.parquet", _PAIR)
    if samples and judged and [row["prompt"] for row in samples] != [row["prompt"] for row in judged]:
        raise UserError(f"{evaluation} is damaged: samples.parquet and preferences.parquet hold other prompts")
    return RunData(
        path=str(workdir),
        name=workdir.name or str(workdir),
        record=record,
        round=number,
        by_round=by_round.read_text() if by_round.exists() else None,
        stages={stage: _state(folder) for stage, folder in folders.items()},
        later={name: _state(shared.get(name, workdir / name)) for name in later},
        metrics={stage: _lines(folders[stage] / "metrics.jsonl") for stage in STAGES if stage not in ("label", "eval")},
        labels=labels,
        label_manifest=_object(label / "manifest.json", rows=int, status=dict),
        audit=_figures(label / "audit.json"),
        audit_page=_relative(label / "audit.html", workdir),
        by_principle=_by_principle(label / "preferences.parquet", labels),
        normalisation=_normalisation(folders["reward_model"] / "normalisation.json"),
        samples=samples,
        judged=judged,
        eval_manifest=_object(evaluation / "manifest.json", rows=int, status=dict),
        results=results,
        critique=_figures(folders["critique"] / "results.json"),
        sl_cai=_object(folders["sl_cai"] / "results.json", **_COUNTS),
        ground_truth=_ground_truth(record.get("config", {}), results, [*(labels or ()), *(samples or ())]),
    )


def _relative(file: epath.Path, folder: epath.Path) -> str | None:
    """The link to a file from a page in a folder; None where there is no file."""
    return urllib.parse.quote(os.path.relpath(file, folder)) if file.exists() else None


def _by_principle(file: epath.Path, labels: list[dict] | None) -> Columns | None:
    return principle_columns(file, {name: [row[name] for row in labels] for name in labels[0]}) if labels else None


def _state(folder: epath.Path) -> str:
    record = _object(folder / "stage.json")
    if record is None:
        return "not run"
    return "done" if record.get("done") else "unfinished"


def _object(file: epath.Path, **kinds: type) -> dict | None:
    """A JSON object that has at least the fields in `kinds`, each of its type; None where there is no file."""
    if not file.exists():
        return None
    value = read_json(file)
    if not isinstance(value, dict):
        raise _damaged(file, "no JSON object")
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind):
            raise _damaged(file, f"{name} is missing or of another type")
    return value


def _normalisation(file: epath.Path) -> dict | None:
    value = _object(file)
    if not (value or {}).get("validation_pairs"):  # where no labels were held out
        return value
    return _object(file, scale=float, validation_loss=float, validation_accuracy=float, validation_pairs=int)


def _damaged(file: epath.Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged ({reason}): delete it and run the stage that writes it")


def _figures(file: epath.Path) -> dict | None:
    """An object of figures, each with mean, ci95 and n, and of plain values."""
    values = _object(file)
    for name, figure in (values or {}).items():
        if isinstance(figure, dict) and not _is_figure(figure):
            raise _damaged(file, f"{name} is no figure")
    return values


def _is_figure(figure: dict) -> bool:
    interval = figure.get("ci95")
    if not {"mean", "n"} <= set(figure) or not isinstance(interval, list) or len(interval) != 2:
        return False
    numbers = [figure["mean"], *interval]
    return numbers == [None] * 3 or all(isinstance(x, (int, float)) for x in numbers)


def _lines(file: epath.Path) -> list[dict]:
    return read_json_lines(file) if file.exists() else []


def _samples(file: epath.Path, policy: str) -> list[dict] | None:
    """The samples with the policy that a stage trained called "policy"."""
    if not file.exists():
        return None
    rows = [by_role(row, policy) for row in read_parquet(file).to_pylist()]
    if missing := set(_SAMPLE) - set(rows[0] if rows else ()):
        raise _damaged(file, f"no column {min(missing).replace('policy', policy)}")
    return rows


def _rows(file: epath.Path, columns: tuple[str, ...]) -> list[dict] | None:
    if not file.exists():
        return None
    table = read_parquet(file)
    missing = set(columns) - set(table.column_names)
    if missing:
        raise _damaged(file, f"no column {min(missing)}")
    return table.to_pylist()


def _ground_truth(config: dict, results: dict | None, rows: list[dict]) -> GroundTruth | None:
    """That of the embedded corpus; None where the run's prompts are from elsewhere."""
    if results is not None and not any(name.startswith("ground_truth_") for name in results):
        return None
    names = [field.name for field in dataclasses.fields(embedded.EmbeddedConfig)]
    fields = {name: config.get(f"data.embedded.{name}") for name in names}
    if config.get("data.evaluation_prompts.kind") != "embedded" or None in fields.values() or "seed" not in config:
        return None
    truth = embedded.GroundTruth(embedded.EmbeddedConfig(**fields), config["seed"])
    known = {row["prompt"] for row in rows if truth.knows(row["prompt"])}
    return (lambda prompt, reply: truth.is_good(prompt, reply) if prompt in known else None) if known else None
