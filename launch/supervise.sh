#!/usr/bin/env bash
# Runs a command again for as long as that can help; the same command resumes. Also sourced: `restartable` and `supervise`.
#   bash launch/supervise.sh bash launch/local_cluster.sh 2 -m moe_embed.train --config=... --workdir=...
# Its exit status decides:
#   75 (EX_TEMPFAIL: told to stop, and saved), 76 (another process hung), 128 + n (killed by signal n)            run again
#   0 done, 1 a fault of the program, 2 of what it was told, 130 Ctrl-C, 141 nobody reads its output, any other   end with it
# At most RESTARTS (10) times in a row, after PAUSE (10, whole) seconds, then twice as many, up to 300; after three hours of work the count starts anew,
# after a day where it ended with 76 or 142: the watchdog's, and what hangs at every start is not to be started for ever.
# SIGTERM, SIGHUP (as SIGTERM: the line to this terminal broke) and SIGINT go to the command, which is then not run again, and whose status is this one's.

restartable() { # STATUS
    case $1 in
        "${final:-}") false ;; # a status that the caller deals with itself
        75 | 76) true ;;
        130 | 141) false ;;
        *) [ "$1" -gt 128 ] && [ "$1" -le 192 ] ;; # 64 signals; above are ssh's 255 and srun's 253
    esac
}

worked() { # STATUS SECONDS: whether so long was work. What hangs takes config.run.watchdog, an hour, and half an hour for compiling.
    case $1 in
        76 | 142) [ "$2" -ge 86400 ] ;; # one who chose a longer watchdog is to be stopped too
        *) [ "$2" -ge 10800 ] ;;
    esac
}

restarts=0 next=${PAUSE:-10} told='' child='' # `told`: the signal that this shell was sent; `child`: what runs beside it
once_more() { # STATUS SECONDS: true, after a pause, where what ended so after so long is to be run again
    if [ -n "$told" ] || ! restartable "$1"; then return 1; fi
    if worked "$1" "$2"; then restarts=0 next=${PAUSE:-10}; fi
    if [ "$restarts" -ge "${RESTARTS:-10}" ]; then
        echo "supervise: it ended with $1 again, after $restarts restarts in a row; that is enough." >&2
        return 1
    fi
    restarts=$((restarts + 1))
    echo "supervise: it ended with $1; restart $restarts of ${RESTARTS:-10} in $next s." >&2
    sleep "$next" &
    child=$!
    if [ -n "$told" ]; then kill "$child" 2>/dev/null || true; fi # told just before there was this child
    wait "$child" || true
    next=$((next * 2 < 300 ? next * 2 : 300))
    [ -z "$told" ]
}

supervise() { # COMMAND ...
    local began status
    # A process group of its own: without, a shell that has no terminal starts what runs beside it deaf to SIGINT.
    set -m
    trap 'told=TERM; kill -TERM "$child" 2>/dev/null || true' TERM
    trap 'told=HUP; kill -TERM "$child" 2>/dev/null || true' HUP
    trap 'told=INT; kill -INT "$child" 2>/dev/null || true' INT
    while :; do
        began=$SECONDS
        "$@" < /dev/null &
        child=$!
        if [ -n "$told" ]; then kill -TERM "$child" 2>/dev/null || true; fi # told between the pause and this child
        while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a trap ends `wait`, not the command
        status=0
        wait "$child" || status=$?
        once_more "$status" $((SECONDS - began)) || break
    done
    trap - TERM HUP INT
    set +m
    return "$status"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    if [ $# -eq 0 ]; then
        sed -n '2,3s/^# //p' "$0" >&2
        exit 2
    fi
    supervise "$@"
fi
