"""curl of a TPU VM's metadata. STAND_IN_WORKER says which VM asks: SLICE/WORKER."""

import os
import sys

from recording import record

PREFIX = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
arguments = record("curl")
assert "Metadata-Flavor: Google" in arguments, "the metadata server answers nobody else"
assert "-sf" in arguments, "or an attribute that is missing would be a page that says so"
slice_index, worker = map(int, os.environ["STAND_IN_WORKER"].split("/"))
slices, workers = map(int, os.environ["STAND_IN_SLICES"].split("x"))
names = [f"t1v-n-abc-w-{i}:{i}:127.0.0.{slice_index + 1}" for i in range(workers)]
tpu_env = ["ACCELERATOR_TYPE: 'v4-16'", f"WORKER_ID: '{worker}'"]
if slices > 1:
    tpu_env += [
        "MEGASCALE_COORDINATOR_ADDRESS: '127.0.0.1:8080'",
        f"MEGASCALE_NUM_SLICES: '{slices}'",
        f"MEGASCALE_SLICE_ID: '{slice_index}'",
    ]
attributes = {
    "agent-worker-number": str(worker),
    "worker-network-endpoints": os.environ.get("STAND_IN_ENDPOINTS", ",".join(names)),
    "tpu-env": "\n".join(tpu_env),
}
name = arguments[-1].removeprefix(PREFIX)
if name not in attributes:
    sys.exit(22)  # --fail: an error of HTTP
print(attributes[name])
