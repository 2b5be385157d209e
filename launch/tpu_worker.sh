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
# What the tpu-env attribute, whose lines are KEY: 'VALUE', tells of several slices, $2 where there is but one.
tpu_env() {
  local found
  found=$(sed -n "s/^ *MEGASCALE_$1 *: *'\{0,1\}\([^']*\)'\{0,1\} *$/\1/p" <<< "$lines")
  echo "${found:-$2}"
}

worker=$(attribute agent-worker-number)
IFS=, read -r -a endpoints <<< "$(attribute worker-network-endpoints)"  # of this slice: HOST, or NAME:ID:HOST
lines=$(attribute tpu-env || true)

export JAX_NUM_PROCESSES=$(($(tpu_env NUM_SLICES 1) * ${#endpoints[@]}))
export JAX_PROCESS_ID=$(($(tpu_env SLICE_ID 0) * ${#endpoints[@]} + worker))
coordinator=$(tpu_env COORDINATOR_ADDRESS "${endpoints[0]##*:}")
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
