#!/usr/bin/env bash
# Installs what is missing, then runs SFT, labelling, reward model, PPO and evaluation on the embedded default.
# Further arguments go to rlaif_jax.main, e.g. --config.judge.shuffle_weights=True --workdir=runs/control.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
exec .venv/bin/python -m rlaif_jax.main --config=configs/quickstart.py --workdir=runs/quickstart "$@"
