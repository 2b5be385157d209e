"""srun [OPTION...] COMMAND..., one task a node, with the variables of srun(1), OUTPUT ENVIRONMENT VARIABLES."""

import os
import sys

from recording import STATE, as_shell, option, record, run_all

arguments = record("srun")
at = next(i for i, each in enumerate(arguments) if not each.startswith("-"))
options, command = arguments[:at], arguments[at:]
assert option(options, "ntasks-per-node") == "1"
nodes = int(os.environ["SLURM_JOB_NUM_NODES"])


def variables(task: int) -> dict[str, str]:
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": ",".join(["localhost"] * nodes),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(nodes),
        "SLURM_NTASKS": str(nodes),
        "SLURM_NPROCS": str(nodes),
        "SLURM_PROCID": str(task),
        "SLURM_NODEID": str(task),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{nodes})",
    }


statuses = run_all([(command, os.environ | variables(task), STATE) for task in range(nodes)])
sys.exit(max(map(as_shell, statuses)))
