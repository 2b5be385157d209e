#!/usr/bin/env bash
# Installs what is missing, then runs the tests: the default tier, or with --all everything, slow end-to-end runs
# included. --peers adds PyTorch and the live comparisons. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=(requirements-test.txt)
for argument in "$@"; do
  [ "$argument" != --peers ] || requirements+=(requirements-peers.txt)
done
bash launch/install.sh "${requirements[@]}"
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
