#!/usr/bin/env bash
# The tests. Alone: all but the slow ones, those that need special hardware, and the markers faults, notebooks, readme and bench.
# With arguments: what pytest selects by them.
#   bash launch/test.sh                       bash launch/test.sh tests/parity              bash launch/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
# torch beside jax, where a CPU build of it exists under the pinned number, and libtpu, which compiles for TPUs without one;
# elsewhere the run says which tests that costs.
extras=(test serve gcs)
if "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then extras+=(torch); fi
# Large, and for those who ask: other people's software that opens our exports, runs our models, or executes notebooks.
for extra in mteb deploy notebooks; do
    if [[ "$*" == *"$extra"* ]]; then extras+=("$extra"); fi
done
if [ "$(uname -sm)" = "Linux x86_64" ]; then extras+=(tpu); fi
ready_venv "${extras[@]}"

# What CI runs goes in two processes: tracing and compiling keep one core each. A file's tests share what is made for them.
two=(-n 2 --dist loadfile)
if [ $# -eq 0 ]; then
    ruff check --quiet .
    ruff format --check --quiet .
    set -- "${two[@]}" -m "not slow and not gpu and not faults and not notebooks and not readme and not bench"
elif [ "$*" = "-m faults" ]; then
    set -- "${two[@]}" "$@"
fi
exec python -m pytest "$@"
