#!/usr/bin/env bash
# Runs a command as N processes on this machine that form one JAX program, as the machines of a cluster do.
#
#   bash launch/local.sh [--dry-run] N COMMAND...
#   bash launch/local.sh 2 python -m rlaif_jax.main --config=configs/quickstart.py --workdir=runs/two
#
# Every line of output begins with the number of its process; with --workdir=DIR they are kept in DIR/logs/processI.log,
# else in a new folder. The GPUs there are, if any, are shared out evenly. SIGTERM and Ctrl-C reach all processes.
# After an error of one the others are ended. Status 75 (preempted, or a process was lost) starts the command again, up
# to RESTARTS times (default 0). GRACE: seconds that the others of a process that has ended may take (default 60).
# Exit status: 0 if that of all processes is, else the first error, else 75.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi
if [ $# -lt 2 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash launch/local.sh [--dry-run] N COMMAND..." >&2
  exit 2
fi
count=$1
shift
whole='^(0|[1-9][0-9]*) (0|[1-9][0-9]*)$'
if ! [[ "${GRACE:-60} ${RESTARTS:-0}" =~ $whole ]]; then
  echo "local: GRACE=${GRACE:-60} and RESTARTS=${RESTARTS:-0} must be whole numbers" >&2
  exit 2
fi
if [[ "$1" = -* ]]; then echo "local: $1 is no command: flags come before N" >&2; exit 2; fi

gpus=()
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
  listed="${CUDA_VISIBLE_DEVICES-$({ nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true; } |
    paste -sd, -)}"
  IFS=', ' read -r -a gpus <<< "$listed"
fi
if [ $((${#gpus[@]} % count)) != 0 ]; then
  echo "local: $count processes can't share ${#gpus[@]} GPUs evenly: change N, or name GPUs in CUDA_VISIBLE_DEVICES" >&2
  exit 2
fi

logs=
for argument in "$@"; do
  case "$argument" in
    --workdir=*://*) ;;
    --workdir=*) logs="${argument#--workdir=}/logs" ;;
  esac
done

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Sets `variables`: what process $1 finds out from that it is one of several, the coordinator being at port $2.
set_variables() {
  variables=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$2" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1")
  local share=$((${#gpus[@]} / count))
  if [ "$share" != 0 ]; then
    variables+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:$(($1 * share)):share}")")
  fi
}

if $dry_run; then
  port=$(free_port)
  for ((i = 0; i < count; i++)); do
    set_variables "$i" "$port"
    printf '%q ' env "${variables[@]}" "$@"
    echo
  done
  exit 0
fi

logs="${logs:-$(mktemp -d -t rlaif_jax.XXXXXX)}"
mkdir -p "$logs"
echo "local: logs in $logs"

# Starts all processes and waits for them; sets `status` to what they come to. Each is in a session of its own, or a
# SIGTERM to the group of this script would come to them twice, and the second one kills. What else runs here outlives it.
run_once() {
  local i port code deadline='' told=0
  status=0
  port=$(free_port)
  for ((i = 0; i < count; i++)); do
    set_variables "$i" "$port"
    setsid env "${variables[@]}" "$@" \
      > >(trap '' TERM INT HUP; tee -a "$logs/process$i.log" | sed -u "s/^/[$i] /") 2>&1 &
    pids[i]=$!
  done
  while [ ${#pids[@]} != 0 ]; do
    for i in "${!pids[@]}"; do
      if kill -0 "${pids[i]}"; then continue; fi
      code=0
      wait "${pids[i]}" || code=$?
      unset "pids[i]"
      take "$i" "$code"
    done
    if [ "$told" -lt "$asked" ]; then
      told=$asked
      end_all TERM
    fi
    if [ "$status" != 0 ] && [ -z "$deadline" ]; then
      deadline=$((SECONDS + ${GRACE:-60}))
      [ "$status" = 75 ] || end_all TERM  # with 75 they are saving, and a second SIGTERM would kill them
    fi
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then end_all KILL; fi
    sleep 0.1 || true
  done 3>&2 2>/dev/null  # where bash would report who was killed
}

# Process $1 ended with status $2. An error beats the 75 of others; a process that was killed is lost.
take() {
  if [ "$2" = 0 ]; then return; fi
  echo "local: process $1 ended with status $2" >&3
  if [ "$status" = 0 ] || [ "$status" = 75 ]; then status=$(($2 > 128 ? 75 : $2)); fi
}

end_all() {
  [ ${#pids[@]} = 0 ] || kill "-$1" "${pids[@]}" 2>/dev/null || true
}

pids=()  # of the processes that run, by their numbers
trap 'end_all TERM' EXIT
asked=0  # how often to stop
trap '((++asked))' TERM INT HUP
for ((attempt = 0; ; attempt++)); do
  run_once "$@"
  if [ "$status" != 75 ] || [ "$asked" != 0 ] || [ "$attempt" -ge "${RESTARTS:-0}" ]; then exit "$status"; fi
  echo "local: starting again ($((attempt + 1)) of $RESTARTS)" >&2
done
