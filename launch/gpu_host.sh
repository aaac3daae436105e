#!/usr/bin/env bash
# One process drives all GPUs of this host, and is run again for as long as that can help (launch/supervise.sh says when).
#   bash launch/gpu_host.sh -- -m moe_embed.train --config=configs/nomic_v2/pretrain.py --workdir=runs/big --config.data.sources=...
# On several hosts the same on each, with its own --process_id (from 0) and a workdir that all see:
#   bash launch/gpu_host.sh --coordinator=HOST0:8476 --num_processes=2 --process_id=0 -- -m moe_embed.train ...
# RESTARTS and PAUSE are supervise.sh's; CLUSTER_PYTHON=P runs P as it is, CUDA_VISIBLE_DEVICES=0,1 takes some of the GPUs.
set -euo pipefail
usage() {
    echo "error: $1" >&2
    sed -n '3,5s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --coordinator=?*:?* | --num_processes=?* | --process_id=?*) flags+=("$1") ;;
        *) usage "gpu_host.sh does not know $1; it takes --coordinator=HOST:PORT, --num_processes=N, --process_id=I, then -- and the command." ;;
    esac
    shift
done
if [ $# -lt 2 ]; then usage "no command for python after --."; fi
if [ ${#flags[@]} -ne 0 ] && [ ${#flags[@]} -ne 3 ]; then usage "of --coordinator, --num_processes and --process_id there are all three or none."; fi
shift
for flag in ${flags[@]+"${flags[@]}"}; do
    case $flag in
        --coordinator=*) export JAX_COORDINATOR_ADDRESS=${flag#*=} ;;
        --num_processes=*) export JAX_NUM_PROCESSES=${flag#*=} ;;
        --process_id=*) export JAX_PROCESS_ID=${flag#*=} ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
source launch/gpus.sh
source launch/supervise.sh
ready_gpus
export PYTHONUNBUFFERED=1
status=0
supervise "$python" "$@" || status=$?
exit "$status"
