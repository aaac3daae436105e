#!/usr/bin/env bash
# Our models beside published ones: BEIR, MIRACL and MTEB(eng, v2) of each, then one table. Run again, it does what is missing (with --tasks all of it).
#   bash launch/paper_table.sh runs/mine my_model               needs a network the first time; figures in runs/paper_table/NAME/
#   bash launch/paper_table.sh --dry-run runs/mine              says what it would run
#   bash launch/paper_table.sh --tasks=DIR,DIR runs/mine        these BEIR folders instead, without a network
#   TABLE_PYTHON=P   run P as it is; default: python of .venv, made or completed first        RUN=DIR   instead of runs/paper_table
set -euo pipefail
usage() { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
here=$PWD
dry='' tasks='' models=()
for argument in "$@"; do
    case $argument in
        --dry-run) dry=yes ;;
        --tasks=?*) tasks=${argument#--tasks=} ;;
        -*) usage ;;
        *) models+=("$argument") ;;
    esac
done
[ ${#models[@]} -gt 0 ] || usage
run=${RUN:-runs/paper_table}
if [ -n "$tasks" ]; then run=$run/these_tasks; fi
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
if [ "$here" != "$PWD" ]; then echo "error: start this in $PWD; models, tasks and figures are named from there." >&2; exit 2; fi
if [ -z "$dry" ] && [ -z "${TABLE_PYTHON:-}" ]; then if [ -n "$tasks" ]; then ready_venv; else ready_venv mteb; fi; fi
python=${TABLE_PYTHON:-python}

do_it() { # the command, shown as it can be typed
    printf '+'; printf ' %q' "$@"; echo
    if [ -z "$dry" ]; then "$@"; fi
}
measure() { # output, then the verb and its arguments; what is newer than all of the model stays
    local output=$1
    shift
    if [ -z "$tasks" ] && [ -e "$output" ] && [ -z "$(find "$model" -type f -newer "$output" -print -quit)" ]; then echo "$output is up to date."; return; fi
    do_it "$python" -m "$@" --model="$model" --output="$output"
}

folders=()
for model in "${models[@]}"; do
    [ -d "$model" ] || { echo "error: $model is no folder: name workdirs, or folders written by export." >&2; exit 2; }
    folder=$run/$(basename "$model")
    for other in ${folders[@]+"${folders[@]}"}; do
        if [ "$folder" = "$other" ]; then echo "error: two models are named $(basename "$model"); rows go by the folder's name." >&2; exit 2; fi
    done
    folders+=("$folder")
    if [ -z "$dry" ]; then mkdir -p "$folder"; fi
    if [ -n "$tasks" ]; then
        measure "$folder/tasks.json" moe_embed.evaluate --task="$tasks"
    else
        measure "$folder/beir.json" moe_embed.evaluate --task=mteb:BEIR
        measure "$folder/miracl.json" moe_embed.evaluate --task=mteb:MIRACLRetrieval
        measure "$folder/mteb.json" moe_embed.mteb_benchmark --benchmark="MTEB(eng, v2)"
    fi
done
do_it "$python" -m moe_embed.paper_table --ours="$(IFS=,; echo "${folders[*]}")"
