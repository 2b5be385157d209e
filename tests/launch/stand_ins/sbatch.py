"""sbatch [OPTION...] SCRIPT [ARGUMENT...], which waits, and starts a job again that has been queued again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from recording import STATE, option, record

arguments = record("sbatch")
at = next(i for i, each in enumerate(arguments) if not each.startswith("-"))
script, options, command = Path(arguments[at]), arguments[:at], arguments[at + 1 :]
options += re.findall(r"^#SBATCH (\S+)$", script.read_text(), re.M)
assert "--requeue" in options
# Slurm runs a copy of the script, so that it can't find the repository from its own place.
spooled = STATE / "slurm_script"
shutil.copy(script, spooled)
array = option(options, "array")
first, last = map(int, array.split("-")) if array else (0, 0)
number, status = int(os.environ["STAND_IN_JOB"]), 0
for index in range(first, last + 1):
    job = {
        "SLURM_JOB_ID": str(number + index),
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_JOB_NUM_NODES": option(options, "nodes"),
        "SLURM_NTASKS_PER_NODE": option(options, "ntasks-per-node"),
    }
    if array:
        job |= {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(index)}
    restarts = 0
    while True:
        restarted = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        status = subprocess.run(["bash", spooled, *command], env=os.environ | job | restarted, cwd="/").returncode
        queued_again = STATE / f"requeued-{job['SLURM_JOB_ID']}"
        if not queued_again.exists():
            break
        queued_again.unlink()
        restarts += 1
sys.exit(status)
