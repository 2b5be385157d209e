#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU slice, or of several, that it gets as a queued resource.
#
#   bash launch/tpu_pod.sh run NAME --zone=ZONE --accelerator-type=TYPE --runtime-version=VERSION FLAG... -- COMMAND...
#   bash launch/tpu_pod.sh delete NAME --zone=ZONE
#
#   bash launch/tpu_pod.sh run pod --zone=us-east5-b --accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e \
#     --spot -- python -m rlaif_jax.main --config=configs/smollm2.py --workdir=gs://BUCKET/runs/pod
#
# `run` asks for the resource, waits until it is there, copies this folder to all workers, installs it and runs the
# command, whose --workdir must be where all workers can read and write. It runs the command again where its status is
# 75 (preempted, or a process was lost) or a connection broke, and asks for the resource anew where it is gone, RESTARTS
# times (default 100) in all. The resource stays until `delete`; `run` with a NAME that exists goes on with that.
#
# --zone, --project and --quiet go to every gcloud command, --internal-ip and --tunnel-through-iap to ssh and scp, all
# other flags to `gcloud compute tpus queued-resources create`: --spot, --node-count=SLICES (each of TYPE), --reserved,
# --service-account, --network ... --dry-run prints the commands instead. POLL: seconds between looks at the resource's
# state (default 30).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n 's/^#   \{0,1\}\(bash launch.*\)/\1/p' launch/tpu_pod.sh | head -2 >&2
  exit 2
}

fail() {
  echo "tpu_pod: $1" >&2
  exit 2
}

dry_run=false before=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --dry-run ]; then dry_run=true; else before+=("$1"); fi
  shift
done
set -- "${before[@]}" "$@"
verb="${1:-}" name="${2:-}"
if [[ "$verb" != run && "$verb" != delete ]] || [[ -z "$name" || "$name" = -* ]]; then usage; fi
shift 2
common=(--quiet) reach=() create=("--node-id=$name") slices=("$name")
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --zone=* | --project=*) common+=("$1") ;;
    --internal-ip | --tunnel-through-iap) reach+=("$1") ;;
    --node-count=1) ;;
    --node-count=*)
      [[ "${1#*=}" =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a positive whole number"
      create[0]="$1"
      slices=()
      for ((i = 0; i < ${1#*=}; i++)); do slices+=("$name-$i"); done  # as they are called
      ;;
    --quiet) ;;
    --*) create+=("$1") ;;
    *) fail "unexpected argument $1: flags are --NAME=VALUE, the command comes after --" ;;
  esac
  shift
done
[[ "${common[*]}" = *--zone=* ]] || fail "--zone is missing"
if [ "$verb" = run ]; then
  shift || true
  if [ $# = 0 ]; then echo "tpu_pod: no command after --" >&2; usage; fi
  for flag in --accelerator-type --runtime-version; do
    [[ "${create[*]}" = *$flag=* ]] || fail "$flag is missing"
  done
  workdir='[[:space:]]--workdir[=[:space:]]([^[:space:]]*)'
  if [[ " $*" =~ $workdir ]]; then
    workdir=${BASH_REMATCH[1]}
    [[ "$workdir" = gs://* || "$workdir" = /mnt/* ]] ||
      fail "--workdir=$workdir is on no disk that the workers share: take gs://BUCKET/..., or one mounted below /mnt"
  fi
fi
command=$(printf '%q ' bash rlaif_jax/launch/tpu_worker.sh "$@")

run() {
  if $dry_run; then printf '%q ' "$@"; echo; else "$@"; fi
}
resources() {
  run gcloud compute tpus queued-resources "$@" "${common[@]}"
}
# Calls $1 with each slice and $2, all at the same time, for the processes wait for each other. (`queued-resources ssh`,
# for all slices at once, starts no more than 64.)
in_all_slices() {
  local slice calls=() call broken=0
  for slice in "${slices[@]}"; do
    if $dry_run; then "$1" "$slice" "${2:-}"; continue; fi
    "$1" "$slice" "${2:-}" &
    calls+=($!)
  done
  for call in "${calls[@]}"; do
    wait "$call" || broken=$?
  done
  return "$broken"
}
copy() {
  on_workers scp "$folder/rlaif_jax.tar.gz" "$1:rlaif_jax.tar.gz"
}
execute() {
  on_workers ssh "$1" --command="$2"
}
on_workers() {
  run gcloud compute tpus tpu-vm "$@" --worker=all --batch-size=all "${reach[@]}" "${common[@]}"
}
# Sets `now` to the resource's state, such as ACTIVE; empty where there is no such resource.
look() {
  now=$(resources describe "$name" --format='value(state.state)' 2>/dev/null) || now=
}
is_gone() {
  [[ -z "$now" || "$now" =~ ^(SUSPENDING|SUSPENDED|DELETING|FAILED)$ ]]
}
pause() {
  echo "tpu_pod: $name is ${now:-gone}" >&2
  sleep "${POLL:-30}"
}

# Returns once the resource is there, asked for anew where it is gone.
acquire() {
  if $dry_run; then
    resources create "$name" "${create[@]}"
    resources describe "$name" --format='value(state.state)'
    return
  fi
  while look; [[ "$now" =~ ^(SUSPENDING|DELETING)$ ]]; do pause; done
  if is_gone; then
    [ -z "$now" ] || resources delete "$name" --force
    resources create "$name" "${create[@]}"
  fi
  while look; [ "$now" != ACTIVE ]; do
    if is_gone; then
      echo "tpu_pod: $name is ${now:-gone}: see gcloud compute tpus queued-resources describe $name ${common[*]}" >&2
      exit 1
    fi
    pause
  done
}

# Copies this folder to all workers, and installs there what is missing. The VMs' own Python is older than 3.11.
# shellcheck disable=SC2016  # expanded on the workers
install='set -e; mkdir -p rlaif_jax; tar -xzf rlaif_jax.tar.gz -C rlaif_jax
for PYTHON in python3.13 python3.12 python3.11; do ! "$PYTHON" -c "" 2>/dev/null || break; done
"$PYTHON" -c "" 2>/dev/null || { sudo apt-get update -qq; sudo apt-get install -y -qq python3.11-venv >/dev/null; }
export PYTHON RLAIF_JAX_ACCELERATOR=tpu
bash rlaif_jax/launch/install.sh requirements-cloud.txt'
set_up() {
  in_all_slices copy && in_all_slices execute "$install"
}

# Runs the command on all workers; sets `status` to 0, the first error, or 75. gcloud's own status may be that of a
# broken connection, which says nothing of the command, so that has to run again.
run_command() {
  local error
  status=0
  in_all_slices execute "$command" 2>&1 | tee "$folder/output" || status=75
  error=$(sed -n 's/.*tpu_worker: process [0-9]* ended with status \([0-9]*\).*/\1/p' "$folder/output" |
    awk '$1 != 0 && $1 != 75 && $1 <= 128 && !found++')
  status=${error:-$status}
}

if [ "$verb" = delete ]; then
  resources delete "$name" --force
  exit
fi
if $dry_run; then
  folder=FOLDER
  acquire
  set_up
  in_all_slices execute "$command"
  exit
fi

folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
# Packed once, so that a restart runs the same code; without what git ignores, which may be gigabytes.
tar -czf "$folder/rlaif_jax.tar.gz" --exclude-from=<(sed 's|/$||' .gitignore) .
for ((attempt = 0; ; attempt++)); do
  acquire
  if set_up; then
    run_command
    if [ "$status" != 75 ]; then exit "$status"; fi
    echo "tpu_pod: status 75: the same command goes on" >&2
  else
    look
    pause
    look
    if ! is_gone; then echo "tpu_pod: the workers could not be set up" >&2; exit 1; fi
  fi
  if [ "$attempt" -ge "${RESTARTS:-100}" ]; then echo "tpu_pod: $attempt restarts: giving up" >&2; exit 75; fi
  look
  pause  # a preemption takes a moment to show
done
