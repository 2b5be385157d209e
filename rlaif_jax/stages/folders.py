"""Where a run keeps its stages: in its folder, or, for a cell of a sweep, where cell.json says."""

from etils import epath

from rlaif_jax.files import read_json


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
