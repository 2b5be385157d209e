#!/usr/bin/env bash
# Runs a command on a GKE cluster as a JobSet (launch/gke.yaml), one pod a machine, and follows its output.
#
#   bash launch/gke.sh [--dry-run] NAME --image=IMAGE --accelerator=TYPE FLAG... -- COMMAND...
#
#   bash launch/gke.sh run1 --image=IMAGE --accelerator=tpu-v6e-slice --topology=4x4 \
#     -- python -m rlaif_jax.main --config=configs/smollm2.py --workdir=gs://BUCKET/runs/run1
#   bash launch/gke.sh run2 --image=IMAGE --accelerator=nvidia-h100-80gb --hosts=2 --chips=8 --claim=CLAIM \
#     -- python -m rlaif_jax.main --config=configs/smollm2.py --workdir=/data/runs/run2
#
#   --accelerator    the node label: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice ..., or nvidia-h100-80gb ...
#   --topology       of a TPU slice, e.g. 4x4 or 2x2x4; the number of pods follows from it and --chips
#   --chips          a machine has: 4 by default on TPUs, 8 on GPUs
#   --slices         number of TPU slices (1)
#   --hosts          number of GPU machines (1)
#   --claim, --mount a persistent volume claim for a --workdir that is no gs://, and its folder in the pods (/data)
#   --service-account  the Kubernetes one, which must be allowed to write to the bucket (default)
#   --namespace      (the current one)
#   --restarts       how often a preemption or a lost process may restart all pods (100)
#   --seeds=0,1,2    a JobSet for each, NAME-0 ..., in whose COMMAND %a stands for the seed
#   --dry-run        prints the JobSet and the commands, and runs none
#
# The same command on a NAME that is there follows it. Ctrl-C ends the following alone; `kubectl delete jobset NAME`
# ends the run. Exit status 0 where all JobSets complete. POLL: seconds between looks (10).
set -euo pipefail
launch="$(cd "$(dirname "$0")" && pwd)"

fail() {
  echo "gke: $1" >&2
  exit 2
}

# The flag $1 is a number.
positive() {
  [[ "${flag[$1]}" =~ ^[1-9][0-9]*$ ]] || fail "--$1=${flag[$1]} must be a positive whole number"
}

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi
name="${1:-}"
[[ -n "$name" && "$name" != -* ]] ||
  fail "usage: bash launch/gke.sh [--dry-run] NAME --image=IMAGE --accelerator=TYPE FLAG... -- COMMAND..."
[[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "NAME is $name, but must be of lower-case letters, digits and -, begin with a letter and not end with -"
shift
declare -A flag=([image]='' [accelerator]='' [topology]='' [chips]='' [slices]=1 [hosts]='' [claim]='' [mount]=/data
  [service-account]=default [restarts]=100 [namespace]='' [seeds]='')
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  key=${1%%=*}
  key=${key#--}
  [[ "$1" = --*=* && -v "flag[$key]" ]] || fail "unknown argument $1: see the beginning of launch/gke.sh"
  [ -n "${1#*=}" ] || fail "$1 has no value"
  flag[$key]=${1#*=}
  shift
done
[ $# -gt 1 ] || fail "no command after --"
shift
[ -n "${flag[image]}" ] || fail "--image is missing"
[ -n "${flag[accelerator]}" ] || fail "--accelerator is missing"
[[ -z "${flag[seeds]}" || "${flag[seeds]}" =~ ^[0-9]+(,[0-9]+)*$ ]] ||
  fail "--seeds=${flag[seeds]} must be whole numbers with a comma between them, e.g. 0,1,2"
[[ -z "${flag[seeds]}" || "$*" = *%a* ]] || fail "--seeds needs %a in the command, e.g. --config.seeds=%a"
[[ -n "${flag[seeds]}" || "$*" != *%a* ]] || fail "%a in the command needs --seeds, e.g. --seeds=0,1,2"
workdir='[[:space:]]--workdir[=[:space:]]([^[:space:]]*)'
if [[ " $*" =~ $workdir ]]; then
  workdir=${BASH_REMATCH[1]}
  [[ "$workdir" = gs://* || ( -n "${flag[claim]}" && "$workdir" = "${flag[mount]%/}"/* ) ]] ||
    fail "--workdir=$workdir would end with the pods: take gs://BUCKET/..., or --claim=CLAIM and ${flag[mount]%/}/..."
fi
kubectl=(kubectl)
[ -z "${flag[namespace]}" ] || kubectl+=("--namespace=${flag[namespace]}")

case "${flag[accelerator]}" in
  tpu-*)
    left_out=(gpu)
    flag[chips]=${flag[chips]:-4}
    topology=${flag[topology]}
    [ -n "$topology" ] || fail "--topology is missing: that of the TPU slice, e.g. 4x4"
    [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "--topology=$topology must be that of a TPU slice, e.g. 4x4"
    [ -z "${flag[hosts]}" ] || fail "--hosts is for GPUs: the number of TPU machines follows from --topology and --chips"
    positive chips
    chips=$((${topology//x/*}))
    [ $((chips % flag[chips])) = 0 ] || fail "--chips=${flag[chips]} a machine don't divide the $chips of $topology"
    flag[hosts]=$((chips / flag[chips]))
    ;;
  *)
    left_out=(tpu)
    flag[chips]=${flag[chips]:-8}
    flag[hosts]=${flag[hosts]:-1}
    [ -z "${flag[topology]}" ] || fail "--topology is for TPUs: the number of GPU machines is --hosts"
    [ "${flag[slices]}" = 1 ] || fail "--slices is for TPUs: the number of GPU machines is --hosts"
    ;;
esac
for key in chips slices hosts; do positive "$key"; done
[[ "${flag[restarts]}" =~ ^(0|[1-9][0-9]*)$ ]] || fail "--restarts=${flag[restarts]} must be a whole number"
[ -n "${flag[claim]}" ] || left_out+=(volume)

# A YAML list of the words $2..., with %a as $1. "$(" would be a reference to a variable to Kubernetes.
yaml_list() {
  local seed=$1 word words=()
  shift
  for word in "$@"; do
    word=${word//%a/"$seed"}
    word=${word//"\$("/"\$\$("}
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    words+=("\"${word//$'\n'/\\n}\"")
  done
  (IFS=,; echo "[${words[*]}]")
}

# The JobSet called $1, whose command is the YAML list $2.
render() {
  local text key
  text=$(sed -E "/# ($(IFS='|'; echo "${left_out[*]}"))(:.*)?$/d" "$launch/gke.yaml")
  flag[name]=$1
  for key in "${!flag[@]}"; do
    text=${text//"\${$key}"/"${flag[$key]}"}
  done
  printf '%s\n' "${text/"\${command}"/"$2"}"
}

# Follows the JobSet $1 until it has completed (status 0) or failed (1).
follow() {
  local state pod shown=''
  while true; do
    state=$("${kubectl[@]}" get jobset "$1" --output='jsonpath={.status.terminalState}')
    [ -z "$state" ] || break
    pod=$("${kubectl[@]}" get pods --selector="$(first_pod "$1")" --output='jsonpath={.items[0].metadata.name}' \
      2>/dev/null) || pod=  # there is none yet, or none again
    if [ "$pod" != "$shown" ] && "${kubectl[@]}" logs --follow --prefix "$pod" 2>/dev/null; then shown=$pod; fi
    sleep "${POLL:-10}"
  done
  echo "gke: $1: $state" >&2
  [ "$state" = Completed ]
}

# The pod whose process prints.
first_pod() {
  echo "jobset.sigs.k8s.io/jobset-name=$1,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

IFS=, read -r -a list <<< "${flag[seeds]}"
[ ${#list[@]} != 0 ] || list=("")
names=()
for seed in "${list[@]}"; do
  names+=("$name${seed:+-$seed}")
  jobset=$(render "${names[-1]}" "$(yaml_list "$seed" "$@")")
  if $dry_run; then
    printf -- '---\n%s\n# to: %s apply --filename=-\n' "$jobset" "${kubectl[*]}"
    printf '# then: %s logs --follow --selector=%s\n' "${kubectl[*]}" "$(first_pod "${names[-1]}")"
  else
    "${kubectl[@]}" apply --filename=- <<< "$jobset"
  fi
done
if $dry_run; then exit; fi

followers=() status=0
for job in "${names[@]}"; do
  follow "$job" &
  followers+=($!)
done
for follower in "${followers[@]}"; do
  wait "$follower" || status=1
done
exit "$status"
