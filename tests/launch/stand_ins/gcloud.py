"""gcloud compute tpus queued-resources create | describe | delete | scp | ssh.

STAND_IN_STATES names the states that `describe` goes through, for one resource after another that is created. What is
on a worker lies in a folder of its own: STATE/SLICE-WORKER.
"""

import json
import os
import shutil
import sys

from recording import STATE, as_shell, option, record, run_all

arguments = record("gcloud")
assert arguments[:3] == ["compute", "tpus", "queued-resources"]
verb, name, rest = arguments[3], arguments[4], arguments[5:]
assert option(rest, "zone") and "--quiet" in rest
file = STATE / "resources.json"
if file.exists():
    states = json.loads(file.read_text())
else:
    states = {"now": [], "to come": json.loads(os.environ["STAND_IN_STATES"])}


def save():
    file.write_text(json.dumps(states))


def workers():
    slices, count = map(int, os.environ["STAND_IN_SLICES"].split("x"))
    return [(s, w) for s in range(slices) for w in range(count)]


def home(slice_index, worker):
    return STATE / f"{slice_index}-{worker}"


if verb == "create":
    assert not states["now"], "it exists already"
    states["now"] = states["to come"].pop(0)
    for place in workers():
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
    source, target = name, rest[0]
    for place in workers():
        shutil.copy(source, home(*place) / target.split(":")[1])
elif verb == "ssh":
    assert {"--node=all", "--worker=all"} <= set(rest)

    def variables(place):
        own = {"STAND_IN_WORKER": "{}/{}".format(*place), "HOME": str(home(*place))}
        return os.environ | own

    command = ["bash", "-c", option(rest, "command")]
    statuses = run_all([(command, variables(place), home(*place)) for place in workers()])
    sys.exit(next((as_shell(status) for status in statuses if status), 0))
else:
    sys.exit(f"no such verb: {verb}")
