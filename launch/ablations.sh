#!/usr/bin/env bash
# The grid of configs/ablations/grid.py, unattended: every variant with three seeds, the dev table, and on the shipped test pages
# each variant beside the first one, with intervals. Run again, it goes on.
#   bash launch/ablations.sh                   SEEDS="0 1" VARIANTS="top1 top2" bash launch/ablations.sh --config.run.steps=50
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ready_venv
run=${RUN:-runs/ablations}
seeds=${SEEDS:-0 1 2}
variants=${VARIANTS:-top2 dense dense_wide top1 every upcycled dense_mlm paper}
tasks=$(printf '%s,' moe_embed/sample/tasks/*)
tasks=${tasks%,}
mkdir -p "$run"

parent() { # the dense encoder after masked language modelling, and the same upcycled
    [ -d "$run/mlm/checkpoints" ] && [ -d "$run/moe" ] && return
    python -m moe_embed.train --config=configs/nomic_v2/mlm.py:tiny --workdir="$run/mlm"
    python -m moe_embed.upcycle --model="$run/mlm" --output="$run/moe"
}

dirs=()
for variant in $variants; do
    for seed in $seeds; do
        dir=$run/$variant-seed$seed
        from=()
        case $variant in
            upcycled) parent; from=(--init_from="$run/moe") ;;
            dense_mlm) parent; from=(--init_from="$run/mlm") ;;
        esac
        echo "== $variant, seed $seed"
        python -m moe_embed.train --config="configs/ablations/grid.py:$variant" --workdir="$dir" --config.run.seed="$seed" ${from[@]+"${from[@]}"} "$@"
        [ -f "$dir.json" ] || python -m moe_embed.evaluate --model="$dir" --task="$tasks" --output="$dir.json"
        dirs+=("$dir")
    done
done
python -m moe_embed.report --workdir="$(IFS=,; echo "${dirs[*]}")" | tee "$run/table.txt"
python -m tests.bench.ablations --run="$run" --against="${variants%% *}" | tee "$run/differences.md"
