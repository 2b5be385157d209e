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
case " $* " in *" --all "*) # a plan for a TPU, which no other test is to find
  [ -d .plan/libtpu ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target=.plan \
    "$(grep ^libtpu requirements-plan.txt)" ;;
esac
.venv/bin/ruff check .
# Two processes, a file of tests each: most tests compile, which takes one core. -n0 for one, as --pdb needs.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
