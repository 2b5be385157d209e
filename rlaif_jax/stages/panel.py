"""Who labels: one judge, or a panel of them, whose labels are kept member by member and combined into one file."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.errors import blame
from rlaif_jax.evaluation.panel import combine, enough, mean
from rlaif_jax.files import read_json, read_parquet, remove_leftovers, write_json, write_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.constitution import Principle
from rlaif_jax.judge.prompts import Pair, text_hash
from rlaif_jax.judge.score import POLICY, Judge, JudgeModel, load_judge, make_judge
from rlaif_jax.models.parameters import move_parameters, parameters_hash
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel import processes
from rlaif_jax.stages.folders import name_in_round
from rlaif_jax.stages.joined import joined, numbers
from rlaif_jax.stages.principles import Labeller, by_principles
from rlaif_jax.stages.run import Run


def labeller(run: Run, principles: Sequence[Principle], seed: int) -> Labeller:
    """What labels pairs, under these principles where there are some; where pairs draw them, by the seed."""
    if run.config.panel.judges:
        label = functools.partial(label_by_panel, run)
    else:
        label = functools.partial(store.label, load_judge(run.config.judge, run.config.seed, run.judge_placement))
    return by_principles(run, label, principles, seed) if principles else label


def member(run: Run, name: str) -> Judge:
    """A judge of the panel; where its weights are "policy", the policy that has made this round's pairs."""
    config = run.config.panel.judges[name]
    with blame(f"panel.judges.{name}"):
        if config.weights != POLICY:
            return load_judge(config, run.config.seed, run.judge_placement)
        begun, stage = run.start()
        params, shape = run.start_params(), dataclasses.replace(run.model_config(), dtype=config.dtype)
        digest = parameters_hash(params)
        params = move_parameters(LanguageModel(shape), params, run.judge_placement)
        title = f"{POLICY} after {name_in_round(stage, begun.round)}"
        model = JudgeModel(title, digest, run.model_config(), params, run.tokenizer())
        return make_judge(config, model, run.config.seed, run.judge_placement)


def label_by_panel(
    run: Run, pairs: Sequence[Pair], folder: epath.Path, description: str, worker: store.Worker = store.ALONE
) -> bool:
    """Each member judges `pairs` into `folder`/panel/NAME; then their labels are combined into `folder`.

    Returns False while labels of other workers are missing. Raises UserError as `judge.store.label` does: a member's
    failures are held to its own `max_failure_rate`, and the panel's to that of `judge`.
    """
    folders = {name: folder / "panel" / name for name in run.config.panel.judges}
    for name, own in folders.items():
        if worker.count == 1:
            remove_leftovers(own)
        _label_by_member(run, name, pairs, own, f"{description}, {name}", worker)
    # Whichever worker wrote the last of these tables comes here after it.
    if not processes.agree(lambda: all((own / "preferences.parquet").exists() for own in folders.values())):
        return False
    manifests = {name: read_json(own / "manifest.json") for name, own in folders.items()}
    provenance = _provenance(manifests, run.config.panel.combine)
    table = _combined(folders, provenance, run.config.panel.combine)
    statuses = collections.Counter(table["status"].to_pylist())
    write_parquet(folder / "preferences.parquet", table)
    members = {name: {key: value for key, value in manifest.items() if key != "shards"}
               for name, manifest in manifests.items()}  # fmt: skip
    manifest = provenance | {"combine": run.config.panel.combine, "rows": table.num_rows, "status": dict(statuses)}
    write_json(folder / "manifest.json", manifest | {"members": members})
    store.check_failures(statuses, run.config.judge.max_failure_rate, folder)
    return True


def _label_by_member(run: Run, name: str, pairs, folder: epath.Path, description: str, worker: store.Worker) -> None:
    """A function of its own, so that no two judges are in memory."""
    store.label(member(run, name), pairs, folder, description, worker)


def _provenance(manifests: Mapping[str, dict], rule: str) -> dict[str, str]:
    """What tells the panel's labels from another's, as of a judge: its members, the rule, and hashes of both."""
    fields = ("judge_hash", "template", "template_hash")
    judges, templates, hashes = ([manifest[name] for manifest in manifests.values()] for name in fields)
    return {
        "judge": f"panel: {', '.join(manifests)}",
        "judge_hash": text_hash("\x00".join(judges)),
        "template": f"{rule} of {'; '.join(templates)}",
        "template_hash": text_hash("\x00".join((rule, *hashes))),
    }


def _combined(folders: Mapping[str, epath.Path], provenance: Mapping[str, str], rule: str) -> pa.Table:
    """The label table of a panel: `stages.joined.joined` with `prob_a_members` (by name), and `combine`."""
    tables = {name: read_parquet(folder / "preferences.parquet") for name, folder in folders.items()}
    some, prob_a = next(iter(tables.values())), numbers(tables, "prob_a")
    same = np.array(some["response_a"]) == np.array(some["response_b"])
    status = np.where(enough(prob_a), "ok", np.where(same, "identical", "panel_unscored"))
    table = joined(tables, provenance, status, combine(prob_a, rule), mean, "prob_a_members")
    return table.append_column("combine", pa.array([rule] * len(status), pa.string()))
