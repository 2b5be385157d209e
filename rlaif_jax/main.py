"""Runs the stages of a config: python -m rlaif_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"""

import importlib.metadata
import subprocess
import sys

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from rlaif_jax.config import Config, check, flatten, parse
from rlaif_jax.errors import UserError
from rlaif_jax.files import read_parquet, write_json
from rlaif_jax.judge import store
from rlaif_jax.judge.score import load_judge
from rlaif_jax.models.parameters import Placement
from rlaif_jax.parallel.mesh import make_mesh
from rlaif_jax.stages.pipeline import STAGES, run_stages
from rlaif_jax.stages.run import Run
from rlaif_jax.summary import print_replay, print_summary

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "gguf")


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    try:
        options = _parse_flags(argv)
        config = parse(options.config.to_dict())
        if options.replay is not None:
            return _replay(_open_run(config, options.workdir), options.replay)
        stages = options.stages or list(STAGES)
        run = _open_run(config, options.workdir)
        with jax.set_mesh(run.placement.mesh):
            write_json(run.workdir / "config.json", _record(config))
            run_stages(run, stages)
        if (run.workdir / "eval" / "results.json").exists():
            print_summary(run)
    except UserError as error:
        print(f"rlaif_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rlaif_jax: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parse_flags(argv: list[str]) -> flags.FlagValues:
    """Raises UserError for a flag or a config field that does not exist or has the wrong type."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file, with an arm after a colon.", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_list("stages", None, "Stages to run, by default all.", flag_values=values)
    flags.DEFINE_integer("replay", None, "Judges this row of the label file again.", flag_values=values)
    try:
        rest = values(argv)
        config = values.config
        if config is None or values.workdir is None:
            raise UserError("usage: python -m rlaif_jax.main --config=configs/NAME.py[:ARM] --workdir=DIR")
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}")
        config.to_dict()  # a config file that could not be loaded raises at its first use
    except UserError:
        raise
    except Exception as error:  # a config file is the user's code, and absl passes on whatever it raises
        message = str(error) or repr(error)
        if "Traceback" in message:  # ml_collections puts the config file's whole traceback in its message
            message = "the config file failed: " + message.strip().splitlines()[-1]
        raise UserError(" ".join(message.split())) from error
    return values


def _open_run(config: Config, workdir: str) -> Run:
    try:
        mesh = make_mesh(config.mesh)
    except ValueError as error:
        raise UserError(str(error)) from error
    check(config, mesh.shape["data"] * mesh.shape["fsdp"])
    return Run(config, epath.Path(workdir), Placement(mesh, config.mesh.replicated))


def _replay(run: Run, row: int) -> int:
    """Judges one label row again; 0 where the label is reproduced, 1 where it is not."""
    file = run.workdir / "label" / "preferences.parquet"
    if not file.exists():
        raise UserError(f"{file} is missing: run --stages=label first")
    with jax.set_mesh(run.placement.mesh):
        judge = load_judge(run.config.judge, run.config.seed, run.placement)
        stored, fresh = store.replay(judge, read_parquet(file), row)
    same = store.same_label(stored, fresh)
    print_replay(judge, stored, fresh, same)
    return 0 if same else 1


def _record(config: Config) -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "config": flatten(config),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "devices": [device.device_kind for device in jax.devices()],
        "git_commit": commit.stdout.strip() or None,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
