"""The stages in order, what each depends on, and the record of what has run under which config."""

from collections.abc import Callable, Iterable

from etils import epath

from rlaif_jax.config import flatten
from rlaif_jax.data.prepare import COLUMNS
from rlaif_jax.data.sources import files
from rlaif_jax.errors import UserError, blame
from rlaif_jax.files import file_hashes, read_json, remove_leftovers, write_json
from rlaif_jax.judge.constitution import load_constitution
from rlaif_jax.judge.prompts import load_template
from rlaif_jax.judge.score import POLICY
from rlaif_jax.models.weights import SHAPE, hash_of, resolve, weights_hash
from rlaif_jax.parallel import processes
from rlaif_jax.stages.best_of_n import run_best_of_n
from rlaif_jax.stages.critique import check_reviser, critique_template, run_critique
from rlaif_jax.stages.evaluate import run_evaluation
from rlaif_jax.stages.folders import all_stages, in_round
from rlaif_jax.stages.label import run_label
from rlaif_jax.stages.overoptimisation import run_overoptimisation
from rlaif_jax.stages.preference import run_preference
from rlaif_jax.stages.reading import check_reward_reader
from rlaif_jax.stages.reward_model import check_labels_by_principle, run_reward_model
from rlaif_jax.stages.rewards import normalisation_file
from rlaif_jax.stages.rl import run_rl
from rlaif_jax.stages.rounds import run_rounds
from rlaif_jax.stages.run import Run
from rlaif_jax.stages.sft import run_sft
from rlaif_jax.stages.sl_cai import run_sl_cai
from rlaif_jax.stages.verifier import find_verifier

STAGES: dict[str, Callable[[Run], bool | None]] = {
    "sft": run_sft,
    "critique": run_critique,
    "sl_cai": run_sl_cai,
    "label": run_label,
    "reward_model": run_reward_model,
    "best_of_n": run_best_of_n,
    "preference": run_preference,
    "rl": run_rl,
    "eval": run_evaluation,
    "overoptimisation": run_overoptimisation,
    "rounds": run_rounds,
}

_SCORES = ("rl.rewards", "rl.penalise_missing_eos", "rl.missing_eos_reward")  # what a reply is worth
# The parts of the config that a stage's result depends on, beyond those of the stages before it.
_PARTS: dict[str, tuple[str, ...]] = {
    "sft": ("seed", "data", "policy", "sft"),
    "critique": ("sampler", "constitution", "critique"),
    "sl_cai": ("sl_cai",),
    "label": ("judge", "panel.judges", "panel.combine", "constitution", "sampler", "label"),
    "reward_model": ("panel", "preferences", "reward_model"),
    "best_of_n": ("sampler", "judge", *_SCORES, "best_of_n"),
    "preference": ("sampler", "judge", "panel", "constitution", "label.principles", "preferences", "preference"),
    "rl": ("sampler", "judge", "rl"),
    "eval": ("judge", "constitution", "sampler", "evaluation"),
    "overoptimisation": ("judge", "sampler", "overoptimisation"),
    "rounds": ("rounds", "judge", "panel", "evaluation"),
}
_READ_BY_NONE = ("eval", "overoptimisation")  # stages of whose results no later one depends, but for `rounds`
# Fields that change how a stage runs, not what it computes (beyond rounding).
_OPERATIONAL = (
    "checkpoint_every",
    "micro_batches",
    ".remat",
    ".attention",
    "commit_every",
    "keep_best",
    "evaluation.shown_samples",
    ".batch_tokens",
    ".max_failure_rate",
    ".max_unscored_rate",
    ".cache",
    "buckets",
    "bucket_multiple",
    "pairs_per_tree",
    "slots",
    "refill",
    "chunk",
)
# The files that bind a stage to the config that it was begun with.
_KEPT = ("checkpoints/checksums/*", "*.parquet", "candidates/*.parquet", "teacher/*.parquet", "replies_*/*.parquet")
_KEPT += ("critique_*/*.parquet", "revision_*/*.parquet")


def plan(run: Run, names: list[str]) -> list[str]:
    """The named stages, of any round, in their order, once it is sure that they can begin.

    Raises UserError for an unknown stage, where a stage up to the last named one was begun under another config or
    with other files, and for a reviser that has no room for a prompt.
    """
    order = all_stages(run.config.stages, run.config.rounds)
    for name in names:
        if name not in order:
            raise UserError(f"unknown stage {name!r}; the stages of this config are {', '.join(order)}")
    _check_weights(run)
    _check_rounds(run)
    check_verifiers(run, names)
    check_reward_reader(run)
    check_labels_by_principle(run)
    if not names:
        raise UserError(f"--stages names no stage; the stages are {', '.join(order)}")
    for name in order[: 1 + max(map(order.index, names))]:
        _check_config(run, name)
    if "critique" in names and not is_done(run, "critique"):
        check_reviser(run)
    return sorted(set(names), key=order.index)


def _check_weights(run: Run) -> None:
    """Raises UserError for a model of which there is the shape alone."""
    for name, value in flatten(run.config).items():
        if name.endswith("weights") and str(value).startswith(SHAPE):
            with blame(name):
                resolve(value)


def _check_rounds(run: Run) -> None:
    """Raises UserError for a folder with rounds beyond those of the config: its last policy is not the run's."""
    beyond = run.workdir / f"round{run.config.rounds + 1}"
    if beyond.exists():
        raise UserError(
            f"config.rounds={run.config.rounds}, but there is {beyond}: rounds can be raised in a folder, not lowered. "
            "Use another --workdir, or delete that folder and those of later rounds"
        )


def check_verifiers(run: Run, names: Iterable[str]) -> None:
    """Raises UserError where one of these stages needs a verifier that can't be found."""
    for group, scorers, users in (
        ("rl.rewards", run.config.rl.rewards, {"rl", "best_of_n", "overoptimisation"}),
        ("rl.gold", run.config.rl.gold, {"rl", "overoptimisation"}),
    ):
        if scorers.verifier and users & set(names) and scorers.verifier_function != "ground_truth":
            find_verifier(scorers.verifier_function, group)


def run_stages(run: Run, names: list[str]) -> None:
    """Runs the stages that `plan` returned; a finished one is left alone.

    Raises UserError for a stage whose predecessor has not finished.
    """
    for name in names:
        if is_done(run, name):
            print(f"{name}: nothing to do", flush=True)
            continue
        _check_predecessors(run, name)
        if run.worker.count == 1:
            remove_leftovers(run.folder(name))
        inputs = stage_inputs(run, name)
        write_json(run.record(name), {"done": False, "config": inputs})
        stage, number = in_round(name)
        if STAGES[stage](run.in_round(number)) is False:
            print(f"{name}: this worker is done; the last one to be finishes the stage", flush=True)
            return
        write_json(run.record(name), {"done": True, "config": inputs})
        processes.stop_if_asked()


def stage_inputs(run: Run, name: str) -> dict:
    """What a stage's result depends on: config fields, and hashes of the files that they name."""
    order = all_stages(run.config.stages, run.config.rounds)
    before = (in_round(earlier)[0] for earlier in order[: order.index(name)])
    needed = {stage: None for stage in before if stage not in _READ_BY_NONE} | {in_round(name)[0]: None}
    parts = [part for stage in needed for part in _PARTS[stage]]
    if not run.config.panel.judges:
        parts = [part for part in parts if part.split(".")[0] != "panel"]
    if not run.config.constitution.file:
        parts = [part for part in parts if part != "constitution"]
    flat = flatten(run.config) | _file_hashes(run)
    wanted = (key for key in flat if any(f"{key}.".startswith(f"{part}.") for part in parts))
    adapters = {stage: lora for stage in needed if (lora := run.lora(stage))}
    return {key: flat[key] for key in wanted if not key.endswith(_OPERATIONAL)} | {
        f"lora.{stage}": [lora.rank, lora.alpha, *lora.targets] for stage, lora in adapters.items()
    }


def _file_hashes(run: Run) -> dict[str, str]:
    hashes, policy = {}, run.config.policy
    for name, judge in run.config.judges.items():
        with blame(f"{name}.prompt.template"):
            hashes[f"{name}.prompt.hash"] = load_template(judge.prompt).digest
        with blame(f"{name}.weights"):
            if judge.weights != POLICY:
                hashes[f"{name}.weights_hash"] = weights_hash(judge.weights)
    if run.config.constitution.file:
        with blame("constitution.file"):
            hashes["constitution.digest"] = load_constitution(run.config.constitution.file).digest
    if policy.weights:
        with blame("policy.weights"):
            hashes["policy.weights_hash"] = weights_hash(policy.weights)
    if policy.adapter:
        with blame("policy.adapter"):
            hashes["policy.adapter_hash"] = hash_of(run.policy_weights().files)
    if run.config.reward_model.weights:
        with blame("reward_model.weights"):
            hashes["reward_model.weights_hash"] = weights_hash(run.config.reward_model.weights)
    if run.config.sft.teacher.weights:
        with blame("sft.teacher.weights"):
            hashes["sft.teacher.weights_hash"] = weights_hash(run.config.sft.teacher.weights)
    if "critique" in run.config.stages:
        hashes["critique.template_hash"] = critique_template(run).digest
        if run.config.critique.weights:
            with blame("critique.weights"):
                hashes["critique.weights_hash"] = weights_hash(run.config.critique.weights)
    gold = run.config.rl.gold
    for group, scorers in (("rl.rewards", run.config.rl.rewards), ("rl.gold", gold)):
        if scorers.judge:
            with blame(f"{group}.judge_prompt.template"):
                hashes[f"{group}.judge_prompt.hash"] = load_template(scorers.judge_prompt).digest
    for name in ("harmless_prompt", "helpful_prompt"):
        if (prompt := getattr(run.config.evaluation, name)).template:
            with blame(f"evaluation.{name}.template"):
                hashes[f"evaluation.{name}.hash"] = load_template(prompt).digest
    if gold.judge and gold.judge_weights:
        with blame("rl.gold.judge_weights"):
            hashes["rl.gold.judge_weights_hash"] = weights_hash(gold.judge_weights)
    if gold.reward_model:
        (hashes["rl.gold.reward_model_hash"],) = file_hashes([normalisation_file(gold.reward_model_run)])
    for role in COLUMNS:
        source = getattr(run.config.data, role)
        if source.kind in ("jsonl", "parquet"):
            with blame(f"data.{role}"):
                found = files(source, run.config.data.root)
            hashes[f"data.{role}.hash"] = "".join(file_hashes(found))
    return hashes


def is_done(run: Run, name: str) -> bool:
    """Whether a stage has run to its end. Raises UserError where the record of it is damaged."""
    return processes.agree(lambda: _is_done(run, name))


def _is_done(run: Run, name: str) -> bool:
    record = run.record(name)
    if not record.exists() or not _read_record(record)["done"]:
        return False
    if name == "rounds" and _changed(run, name):  # more rounds to compare, which binds nobody
        return False
    # A label file that was deleted is put together again from the shards that it was made of; so are the pairs.
    folder, stage = run.folder(name), in_round(name)[0]
    shards = [path for part in ("", "panel/*/", "principles/") for path in folder.glob(f"{part}shards/*")]
    made = ("preferences.parquet", "candidates.parquet") if stage == "label" else ("preferences.parquet",)
    return not shards or all((folder / file).exists() for file in made)


def _read_record(record: epath.Path) -> dict:
    found = read_json(record)
    if not isinstance(found, dict) or not {"done", "config"} <= set(found):
        raise UserError(f"{record} is damaged: delete it and run the stage that writes it")
    return found


def _check_config(run: Run, name: str) -> None:
    folder, record = run.folder(name), run.record(name)
    # A stage that stopped before it kept anything binds nobody.
    kept = any(file for pattern in _KEPT for file in folder.glob(pattern))
    if not record.exists() or not kept:
        return
    if changed := _changed(run, name):
        was = ", ".join(f"{key}={now!r} (was {before!r})" for key, (before, now) in changed.items())
        raise UserError(
            f"stage {name} in {run.workdir} was begun with another config: {was}. Use another --workdir, or delete "
            f"{folder} and the stages after it"
        )


def _changed(run: Run, name: str) -> dict[str, tuple]:
    """What a begun stage depends on that is no longer as it was: what it was, and what it is."""
    before, now = _read_record(run.record(name))["config"], stage_inputs(run, name)
    keys = (key for key in {**before, **now} if not key.endswith(_OPERATIONAL))  # some were none in earlier versions
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _check_predecessors(run: Run, name: str) -> None:
    order = all_stages(run.config.stages, run.config.rounds)
    for earlier in order[: order.index(name)]:
        if not is_done(run, earlier):
            raise UserError(f"stage {name} needs stage {earlier}, which has not finished in {run.workdir}")
