#!/usr/bin/env bash
# N real processes of one program on this machine, joined over loopback as N hosts would be over a network (CPU: gloo).
#   bash launch/local_cluster.sh 2 -m moe_embed.train --config=configs/demo.py:tiny --workdir=runs/two
# Each line says which process wrote it: [p0], [p1], ... If one fails the others are stopped, and its exit code is this one's.
# Run again where that can help, as after a process was killed: bash launch/supervise.sh bash launch/local_cluster.sh 2 ...
#   DEVICES=4          virtual CPU devices in each process (default 1)
#   CLUSTER_PYTHON=P   run P as it is; default: python of .venv, made or completed first
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,7s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
count=$1
shift
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
if [ -z "${CLUSTER_PYTHON:-}" ]; then ready_venv; fi
python=${CLUSTER_PYTHON:-python}

JAX_COORDINATOR_ADDRESS=127.0.0.1:$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$count JAX_NUM_CPU_DEVICES=${DEVICES:-1} JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Devices of one process that wait in a collective hold a thread of XLA's each; the others need one too.
if [ "$JAX_NUM_CPU_DEVICES" -gt 1 ]; then export NPROC=${NPROC:-32}; fi

prefixed() { # a progress bar's \r starts a line too
    local line
    trap '' INT TERM # it ends with what it reads
    while IFS= read -r line || [ -n "$line" ]; do
        while [[ $line == *$'\r'* ]]; do
            if [ -n "${line%%$'\r'*}" ]; then printf '[p%s] %s\n' "$1" "${line%%$'\r'*}"; fi
            line=${line#*$'\r'}
        done
        printf '[p%s] %s\n' "$1" "$line"
    done
}
one() {
    trap : TERM # it and the next end with the process, which hears of it too
    { trap : TERM; JAX_PROCESS_ID=$1 "$python" "${@:2}" 2>&1 >&3 3>&- | prefixed "$1" >&2; } 3>&1 | prefixed "$1"
}

set -m # each process gets a group of its own, so that it can be stopped with all it started
pids=()
for ((i = 0; i < count; i++)); do
    one "$i" "$@" &
    pids+=($!)
done
stop() { for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null || true; done; }
# shellcheck disable=SC2329 # called by the trap
interrupted() {
    stop INT
    for _ in {1..30}; do
        if ! kill -0 "${pids[@]}" 2>/dev/null; then break; fi # none is left
        sleep 0.1
    done
    stop KILL
    exit 130
}
trap interrupted INT
status=0 deadline=
trap 'stop TERM; deadline=$((SECONDS + 60))' TERM HUP # as a machine that goes down: they save, and their status is this one's

while [ ${#pids[@]} -gt 0 ]; do
    left=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            left+=("$pid")
        elif ! { wait "$pid" && code=0 || code=$?; [ "$code" -eq 0 ]; } && [ "$status" -eq 0 ]; then
            status=$code
            deadline=${deadline:-$((SECONDS + 10))} # the others hear of it, and say why they end
        fi
    done
    pids=(${left[@]+"${left[@]}"})
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then stop KILL; fi
    sleep 0.2
done
exit "$status"
