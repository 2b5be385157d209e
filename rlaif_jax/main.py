"""Runs the stages of a config: python -m rlaif_jax.main --config=configs/quickstart.py --workdir=runs/quickstart"""

import importlib.metadata
import re
import subprocess
import sys

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from rlaif_jax.config import Config, check, check_decoder, flatten, parse
from rlaif_jax.errors import UserError, blame, room_in
from rlaif_jax.files import read_parquet, write_json
from rlaif_jax.judge import store
from rlaif_jax.judge.score import load_judge
from rlaif_jax.models import gguf
from rlaif_jax.models.parameters import Placement
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.mesh import make_mesh
from rlaif_jax.stages.pipeline import STAGES, plan, run_stages
from rlaif_jax.stages.run import Run
from rlaif_jax.summary import print_replay, print_summary

_USAGE = "usage: python -m rlaif_jax.main --config=configs/NAME.py[:ARM] --workdir=DIR"
_HELP = f"""  --config.FIELD=VALUE   overrides a field of the config, e.g. --config.seed=1
  --stages=NAME,...      stages to run, of {", ".join(STAGES)}; by default all
  --replay=ROW           judges row ROW of DIR/label/preferences.parquet again and compares"""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "gguf")


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    try:
        if any(argument in ("--help", "-h", "-help") for argument in argv[1:]):
            print(f"{__doc__}\n\n{_USAGE}\n\n{_HELP}")
            return 0
        options = _parse_flags(argv)
        run = _open_run(parse(options.config.to_dict()), options.workdir)
        if options.replay is not None:
            return _replay(run, options.replay)
        stages = plan(run, list(STAGES) if options.stages is None else options.stages)
        with room_in(run.workdir), jax.set_mesh(run.placement.mesh):
            write_json(run.workdir / "config.json", _record(run.config))
            run_stages(run, stages)
        if "eval" in stages:
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
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_list("stages", None, "", flag_values=values)
    flags.DEFINE_integer("replay", None, "", flag_values=values)
    try:
        rest = values(argv)
        config = values.config
        if config is None or values.workdir is None:
            raise UserError(_USAGE)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}")
        config.to_dict()  # a config file that could not be loaded raises at its first use
    except UserError:
        raise
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_field(argv, str(error))) from error
    except Exception as error:  # a config file is the user's code, and absl passes on whatever it raises
        message = str(error) or repr(error)
        if "Traceback" in message:  # ml_collections puts the config file's whole traceback in its message
            message = "the config file failed: " + message.strip().splitlines()[-1]
        raise UserError(" ".join(message.split())) from error
    return values


def _unknown_field(argv: list[str], message: str) -> str:
    """ml_collections' message with the whole path of the field: it names one part alone."""
    name, near = re.search(r"\w+", message), re.search(r'Did you mean "(\w+)"', message)
    for argument in argv[1:]:
        path = argument.split("=")[0].removeprefix("--")
        if path.startswith("config.") and name and name[0] in path.split("."):
            hint = f"did you mean {near[1]}?" if near else "see rlaif_jax/config.py for the fields"
            return f"unknown config field {path}: {hint}"
    return " ".join(message.split())


def _open_run(config: Config, workdir: str) -> Run:
    """Raises UserError where config, devices and models do not fit together."""
    if set(workdir) & set("*?[]"):
        raise UserError(f"--workdir={workdir} must not hold any of * ? [ ]")  # Orbax would read it as a pattern
    folder = epath.Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={workdir} is a file, not a folder")
    with blame("mesh"):
        mesh = make_mesh(config.mesh)
    check(config, mesh.shape["data"] * mesh.shape["fsdp"])
    run = Run(config, folder, Placement(mesh, config.mesh.replicated))
    with blame("policy.weights"):
        policy = run.model_config()
    check_decoder(policy, config.policy.max_prompt_length + config.policy.max_response_length)
    with blame("judge.weights"):
        judge = gguf.model_config(gguf.open_gguf(config.judge.weights))
    if judge.max_position_embeddings < config.judge.max_length:
        raise UserError(
            f"config.judge.max_length={config.judge.max_length} is more than the {judge.max_position_embeddings} "
            f"tokens that {config.judge.weights} can read"
        )
    for name, model in (("policy", run.language_model()), ("judge", LanguageModel(judge))):
        with blame(f"mesh does not fit the {name}"):
            run.placement.parameters(model)
    return run


def _replay(run: Run, row: int) -> int:
    """Judges one label row again; 0 where the label is reproduced, 1 where it is not."""
    file = run.folder("label") / "preferences.parquet"
    if not file.exists():
        raise UserError(f"{file} is missing: run --stages=label first")
    with jax.set_mesh(run.placement.mesh):
        judge = load_judge(run.config.judge, run.config.seed, run.placement)
        stored, fresh = store.replay(judge, read_parquet(file), row)
    same = store.same_label(stored, fresh)
    print_replay(judge, stored, fresh, same)
    return 0 if same else 1


def _record(config: Config) -> dict:
    try:
        command = ["git", "-C", str(epath.Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "config": flatten(config),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "devices": [device.device_kind for device in jax.devices()],
        "git_commit": commit or None,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
