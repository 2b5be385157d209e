"""Where a run keeps its stages: in its folder, or, for a cell of a sweep, where cell.json says."""

from collections.abc import Callable, Sequence

from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.files import read_json

# The last one's figures count where names are the same: those of eval, where rounds were added since `rounds` ran.
_WITH_RESULTS = ("critique", "reward_model", "best_of_n", "rounds", "eval", "overoptimisation")
_ONCE = ("sft", "critique", "sl_cai", "overoptimisation", "rounds")  # stages that all rounds share


def name_in_round(stage: str, number: int) -> str:
    """What a stage is called in a round of a run, and where it keeps its files: label, round2/label ..."""
    return stage if number == 1 or stage in _ONCE else f"round{number}/{stage}"


def in_round(name: str) -> tuple[str, int]:
    """Stage and round of what `name_in_round` returned."""
    head, _, stage = name.rpartition("/")
    return stage, int(head.removeprefix("round") or 1)


def all_stages(stages: Sequence[str], rounds: int) -> tuple[str, ...]:
    """Every stage of a run in its order: `stages` once, then those of each later round, then what compares them."""
    later = [name_in_round(stage, k) for k in range(2, rounds + 1) for stage in stages if stage not in _ONCE]
    return (*stages, *later, *(["rounds"] if rounds > 1 else []))


def cell_stages(workdir: epath.Path) -> dict[str, epath.Path]:
    """The folder of each stage of the sweep's cell SWEEP/cells/ARM/seedN; of a run of its own, none.

    Raises UserError where cell.json is damaged.
    """
    file = workdir / "cell.json"
    if not file.exists():
        return {}
    if not workdir.is_absolute():  # the parents of a relative path end where it begins
        workdir = workdir.absolute()
    root = workdir.parent.parent.parent
    return {stage: root / path for stage, path in read_json(file)["stages"].items()}


def stage_folder(workdir: epath.Path, stage: str) -> epath.Path:
    """Where a run or a sweep's cell keeps the files of a stage."""
    return cell_stages(workdir).get(stage, workdir / stage)


def record_file(workdir: epath.Path) -> epath.Path:
    """The config.json of a run or of a sweep's cell. Raises UserError for a folder that is neither."""
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"{file} is missing: {workdir} is no folder of rlaif_jax.main")
    return file


def last_round(folder_of: Callable[[str], epath.Path], stage: str, file: str) -> int:
    """The last round in which a stage has written a file; 1 where none has.

    folder_of: where the stage of a name, as of `name_in_round`, keeps its files.
    """
    number = 1
    while (folder_of(name_in_round(stage, number + 1)) / file).exists():
        number += 1
    return number


def evaluated_round(folder_of: Callable[[str], epath.Path]) -> int:
    """The last round that has been evaluated: that of the figures of `read_results`."""
    return last_round(folder_of, "eval", "results.json")


def read_results(folder_of: Callable[[str], epath.Path]) -> dict:
    """The figures of all stages that write `results.json`, all of one round: `evaluated_round`.

    Raises UserError where no stage has written any.
    """
    number = evaluated_round(folder_of)
    files = [folder_of(name_in_round(stage, number)) / "results.json" for stage in _WITH_RESULTS]
    found = {file: read_json(file) for file in files if file.exists()}
    if not found:
        raise UserError(f"{folder_of('eval') / 'results.json'} is missing: run the eval stage first")
    for file, results in found.items():
        if not isinstance(results, dict):
            raise UserError(f"{file} has no figures: delete it and run its stage again")
    return {name: value for results in found.values() for name, value in results.items()}
