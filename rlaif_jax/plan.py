"""Plans a run for a machine: python -m rlaif_jax.plan --config=configs/tldr.py:ppo,8b,v5p --topology=v5p:4x4x4

Compiles the config's own steps for it, which nobody here needs to have, and says what each needs of a device and how
long it takes at least. Nothing is loaded and nothing is run.
"""

import pathlib
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence

import jax
from absl import flags
from etils import epath

from rlaif_jax.commands import parse_flags, run_command
from rlaif_jax.config import Config, parse
from rlaif_jax.errors import UserError
from rlaif_jax.files import read_json, write_json
from rlaif_jax.planning.compile import compile_apart
from rlaif_jax.planning.estimate import Estimate, estimate
from rlaif_jax.planning.machines import Machine, devices_of, find_machine
from rlaif_jax.planning.programs import Program, programs_of, unplanned
from rlaif_jax.planning.report import as_data, markdown, print_plan, scaling
from rlaif_jax.progress import progress
from rlaif_jax.stages.run import open_run

_USAGE = "usage: python -m rlaif_jax.plan --config=configs/NAME.py[:ARM] --topology=MACHINE"
_HELP = """  --topology=MACHINE     v5e:AxB, v5p:AxBxC, v6e:AxB (TPU chips), gpu:h100:NODESxGPUS, gpu:h200:NODESxGPUS,
                         cpu or cpu:N (this machine)
  --slices=K             K slices of TPUs, with the data-centre network between them
  --config.FIELD=VALUE   overrides a field of the config, e.g. --config.mesh.tensor=4
  --programs=NAME,...    only these, by stage (rl) or by stage and program (rl/update)
  --compiler=NAME=VALUE,...  options of the compiler, which a run is then to have, too (XLA_FLAGS, LIBTPU_INIT_ARGS)
  --efficiency=SHARE     of the roofline that a run is taken to reach in device-hours; 0.5
  --price=USD            of a device-hour
  --json=FILE            also writes the plan there
  --show=FILE,...        prints plans that were written before as Markdown; compiles nothing
  --scaling=FILE,...     prints what their devices move, machine by machine

Exit status 1 if a program needs more memory than a device has, or can't be compiled. TPUs and GPUs need what
requirements-plan.txt installs."""


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("topology", "", "", flag_values=values)
    flags.DEFINE_integer("slices", 1, "", flag_values=values)
    flags.DEFINE_float("efficiency", 0.5, "", lower_bound=0.01, upper_bound=1.0, flag_values=values)
    flags.DEFINE_float("price", 0.0, "", lower_bound=0.0, flag_values=values)
    flags.DEFINE_string("json", "", "", flag_values=values)
    for name in ("programs", "compiler", "show", "scaling"):
        flags.DEFINE_list(name, [], "", flag_values=values)
    options = parse_flags(argv, _USAGE, values, default_config="configs/quickstart.py")
    for files, table in ((options.show, markdown), (options.scaling, scaling)):
        if files:
            print(table([read_json(_existing(name)) for name in files]))
            return 0
    if not options.topology:
        raise UserError(f"--topology is missing. {_USAGE}")
    jax.config.update("jax_enable_compilation_cache", False)  # what is kept there is for machines that are here
    machine = find_machine(options.topology, options.slices)
    options.config.mesh.slices = options.slices
    config = parse(options.config.to_dict())
    run = open_run(config, epath.Path("."), devices_of(machine))
    chosen = _chosen(list(programs_of(run)), options.programs)
    command = shlex.join(["python", "-m", "rlaif_jax.plan", *(x for x in argv[1:] if not x.startswith("--json"))])
    estimates = _estimates(config, machine, chosen, _compiler_options(options.compiler))
    plan = as_data(run, machine, estimates, command, options.efficiency, options.price)
    plan |= {"unplanned": unplanned(run)}
    print_plan(plan)
    if options.json:
        write_json(epath.Path(options.json), plan)
    return 1 if plan["over"] else 0


def _existing(name: str) -> epath.Path:
    if not epath.Path(name).is_file():
        raise UserError(f"no plan at {name}: --json={name} writes one")
    return epath.Path(name)


def _chosen(programs: list[Program], names: Sequence[str]) -> list[Program]:
    """Those that --programs asks for. Raises UserError for a name that is none."""
    known = {name for program in programs for name in (program.stage, program.title)}
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"--programs={unknown[0]} is no program of this config; they are "
            f"{', '.join(program.title for program in programs)}"
        )
    return [each for each in programs if not names or each.stage in names or each.title in names]


def _compiler_options(pairs: Sequence[str]) -> dict[str, str]:
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise UserError(f"--compiler={bad[0]} must be NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def _estimates(
    config: Config, machine: Machine, programs: Sequence[Program], options: Mapping[str, str]
) -> list[Estimate]:
    estimates = []
    for program in progress(programs, "plan", total=len(programs), unit="program"):
        with tempfile.TemporaryDirectory() as folder:
            where = machine.name, machine.slices
            compiled = compile_apart(config, *where, program.title, options, pathlib.Path(folder))
        estimates.append(estimate(program, compiled, machine))
    return estimates


if __name__ == "__main__":
    sys.exit(main(sys.argv))
