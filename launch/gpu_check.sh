#!/usr/bin/env bash
# Is everything right and fast on this machine's GPU? In at most ten minutes: the tests of marker `gpu` (kernels, attention, losses, a train
# step, each beside the CPU), then the measurements of tests/bench/gpu.py. Installs nothing but the wheels it finds in a folder.
#   bash launch/gpu_check.sh                    PYTHON=python3.12 WHEELS=.whl OUTPUT=runs/gpu bash launch/gpu_check.sh
# Uses the Python that is there, with its own jax for CUDA. What else that Python lacks can lie in $WHEELS as .whl files.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
output=${OUTPUT:-runs/gpu}
start=$SECONDS
mkdir -p "$output"

if ! grep -q GPU <<< "$(nvidia-smi -L 2> /dev/null)"; then # also where there is no nvidia-smi
    echo "error: nvidia-smi finds no GPU here; run this on a machine with one." >&2
    exit 2
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader

if compgen -G "$wheels/*.whl" > /dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" - <<'PY' || exit 2
import importlib.util, sys
needed = "jax jaxlib flax optax orbax.checkpoint numpy ml_collections safetensors sentencepiece tokenizers tqdm pytest".split()
def lacks(name):
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True
missing = [name for name in needed if lacks(name)]
if missing:
    sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}; put their wheels into the folder .whl, or name another in WHEELS.")
PY

# cuda first: jax asks its default device which GPU a kernel is for. Without autotuning a compilation takes seconds, and sums are those of
# every run. Four of the ten minutes are the measurements' own.
export JAX_PLATFORMS=cuda,cpu
status=0
XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0" \
    timeout 270 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu 2>&1 | tee "$output/tests.txt" || status=$?
left=$((570 - (SECONDS - start)))
JAX_PLATFORMS=cuda "$python" -m tests.bench.gpu --seconds="$left" --output="$output/bench.md" || status=$?
echo "done in $((SECONDS - start)) s: $output/tests.txt, $output/bench.md"
exit $status
