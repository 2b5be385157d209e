#!/usr/bin/env bash
# Runs a command as this TPU VM's part of one JAX program over all VMs of a queued resource. launch/tpu_pod.sh calls it
# on each of them, with the same command. What the VM is comes from its metadata.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

# What tpu_pod.sh goes by, for gcloud tells the status of one worker alone.
trap 'echo "tpu_worker: process ${JAX_PROCESS_ID:-} ended with status $?"' EXIT

attribute() {
  curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
# A value of the tpu-env attribute, whose lines are KEY: 'VALUE'; of several slices it tells which one this is.
tpu_env() {
  attribute tpu-env | sed -n "s/^ *$1 *: *'\{0,1\}\([^']*\)'\{0,1\} *$/\1/p"
}

worker=$(attribute agent-worker-number)
IFS=, read -r -a endpoints <<< "$(attribute worker-network-endpoints)"  # of this slice: HOST, or NAME:ID:HOST
slices=$(tpu_env MEGASCALE_NUM_SLICES || true)
slice=$(tpu_env MEGASCALE_SLICE_ID || true)
coordinator=$(tpu_env MEGASCALE_COORDINATOR_ADDRESS || true)
coordinator="${coordinator:-${endpoints[0]##*:}}"

export JAX_NUM_PROCESSES=$((${slices:-1} * ${#endpoints[@]}))
export JAX_PROCESS_ID=$((${slice:-0} * ${#endpoints[@]} + worker))
export JAX_COORDINATOR_ADDRESS="${coordinator%%:*}:${JAX_COORDINATOR_PORT:-8476}"

# A process of before, whose connection was lost, still has the chips.
if [ -e process.pid ] && old=$(cat process.pid) && [ "/proc/$old/cwd" -ef . ]; then
  kill "$old" || true
  for _ in {1..60}; do
    kill -0 "$old" 2>/dev/null || break
    sleep 1
  done
  kill -KILL "$old" 2>/dev/null || true
fi

"$@" &
echo $! > process.pid
wait $!
