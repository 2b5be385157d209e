"""gcloud compute tpus queued-resources create | describe | delete, and gcloud compute tpus tpu-vm scp | ssh.

STAND_IN_STATES names the states that `describe` goes through, for one resource after another that is created; it has
as many slices, and workers in each, as STAND_IN_SLICES says. What is on a worker lies in STATE/SLICE-WORKER.
"""

import json
import os
import shutil
import sys

from recording import STATE, as_shell, option, record, run_all

arguments = record("gcloud")
assert arguments[:2] == ["compute", "tpus"]
group, verb, name, rest = arguments[2], arguments[3], arguments[4], arguments[5:]
assert group == ("tpu-vm" if verb in ("scp", "ssh") else "queued-resources")
assert option(rest, "zone") and "--quiet" in rest
file = STATE / "resources.json"
if file.exists():
    states = json.loads(file.read_text())
else:
    states = {"now": [], "to come": json.loads(os.environ["STAND_IN_STATES"])}


def save():
    file.write_text(json.dumps(states))


slices, workers = map(int, os.environ.get("STAND_IN_SLICES", "1x1").split("x"))


def places(node):
    """The workers of a slice; several are called NAME-0, NAME-1 ... after their resource."""
    assert {"--worker=all", "--batch-size=all"} <= set(rest), "or some would start when others are done"
    slice_index = int(node.rpartition("-")[2]) if slices > 1 else 0
    return [(slice_index, worker) for worker in range(workers)]


def home(slice_index, worker):
    return STATE / f"{slice_index}-{worker}"


if verb == "create":
    assert not states["now"], "it exists already"
    states["now"] = states["to come"].pop(0)
    assert (f"--node-count={slices}" if slices > 1 else f"--node-id={name}") in rest
    for place in [(s, w) for s in range(slices) for w in range(workers)]:
        shutil.rmtree(home(*place), ignore_errors=True)
        shutil.copytree(os.environ["STAND_IN_VM"], home(*place), symlinks=True)
    save()
elif verb == "describe":
    assert "--format=value(state.state)" in rest
    if not states["now"]:
        sys.exit("NOT_FOUND")
    print(states["now"][0])
    if len(states["now"]) > 1:
        states["now"].pop(0)
    save()
elif verb == "delete":
    assert states["now"] and "--force" in rest, "nodes go with --force alone"
    states["now"] = []
    save()
elif verb == "scp":
    source, (node, target) = name, rest[0].split(":")
    for place in places(node):
        shutil.copy(source, home(*place) / target)
elif verb == "ssh":

    def variables(place):
        own = {"STAND_IN_WORKER": "{}/{}".format(*place), "HOME": str(home(*place))}
        return os.environ | own

    command = ["bash", "-c", option(rest, "command")]
    statuses = run_all([(command, variables(place), home(*place)) for place in places(name)])
    sys.exit(next((as_shell(status) for status in statuses if status), 0))
else:
    sys.exit(f"no such verb: {verb}")
