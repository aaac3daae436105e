#!/usr/bin/env bash
# One host of a TPU, as launch/tpu_pod.sh talks to it: setup | start QUOTED_ARGS | status | follow LINE | tail | stop
# The checkout is ~/moe_embed; the run's command, log and exit status are in ~/moe_embed_run, and outlive a new checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=$HOME/moe_embed_run
session=moe_embed # of tmux
mkdir -p "$run"

alive() { tmux has-session -t "$session" 2>/dev/null; }
stop() { tmux kill-session -t "$session" 2>/dev/null || true; } # there may be none
ended() { echo "$1" > "$run/status.new" && mv "$run/status.new" "$run/status"; }

case ${1:-} in
    setup) # Python 3.11 to 3.13: the TPU images have 3.10, and uv's are what maxtext and vLLM take there
        command -v tmux > /dev/null || sudo apt-get install -y -qq tmux
        PYTHON=
        for name in python3.13 python3.12 python3.11; do
            if "$name" -c 'import ensurepip' 2>/dev/null; then PYTHON=$name && break; fi
        done
        if [ -z "$PYTHON" ]; then
            python3 -m pip install --user --quiet uv
            python3 -m uv python install --quiet 3.12
            PYTHON=$(python3 -m uv python find --managed-python --no-project 3.12)
        fi
        source launch/venv.sh
        ready_venv tpu gcs
        ;;
    start)
        printf '%s\n' "$2" > "$run/command"
        stop # one that has said how it ended may be about to
        rm -f "$run/status" "$run/pid"
        : >> "$run/log"
        tmux new-session -d -s "$session" "bash $PWD/launch/tpu_worker.sh session"
        for _ in {1..100}; do
            if [ -f "$run/pid" ]; then exit; fi
            sleep 0.1
        done
        echo "error: on $(hostname) tmux started nothing in 10 s." >&2
        exit 1
        ;;
    session)
        echo $$ > "$run/pid"
        PYTHON=$PWD/.venv/bin/python
        source launch/venv.sh
        status=0
        # In a shell of its own, as it ends that at a fault: without a status it would look like a machine that was restarted.
        (ready_venv tpu gcs) >> "$run/log" 2>&1 || status=$?
        if [ "$status" -ne 0 ]; then
            ended "$status"
            exit
        fi
        ready_venv tpu gcs # again, for PATH
        # Named, a platform that cannot be had is an error; jax would else go on with the CPU.
        export JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1
        printf '== %s python %s\n' "$(date -u +%FT%TZ)" "$(cat "$run/command")" >> "$run/log"
        command=()
        eval "command=($(cat "$run/command"))" # quoted for bash by tpu_pod.sh
        python "${command[@]}" >> "$run/log" 2>&1 || status=$?
        ended "$status"
        ;;
    status) # one line: none | running COMMAND | ended STATUS COMMAND
        up=
        if alive; then up=1; fi # asked before the file is looked for, which is there when the session is not
        if [ ! -f "$run/command" ]; then
            said=none
        elif [ -f "$run/status" ]; then
            said="ended $(cat "$run/status") $(cat "$run/command")"
        elif [ -n "$up" ]; then
            said="running $(cat "$run/command")"
        else
            said="ended 137 $(cat "$run/command")" # without a word, as when the machine was restarted
        fi
        echo "tpu_worker $(hostname) $said"
        ;;
    follow) # the log from a line on, 0: its last twenty; first says which line that is, ends with the run
        from=$2
        if [ "$from" -eq 0 ]; then from=$(($(wc -l < "$run/log") - 19)); fi
        if [ "$from" -lt 1 ]; then from=1; fi
        echo "tpu_worker line $from"
        exec tail -n "+$from" --pid="$(cat "$run/pid")" -f "$run/log"
        ;;
    tail)
        echo "== $(hostname), the end of ~/moe_embed_run/log"
        tail -n 20 "$run/log"
        ;;
    stop) stop ;;
    *)
        sed -n '2s/^# //p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
