#!/usr/bin/env bash
# A run on a Cloud TPU: asked for, set up, run on all its hosts, followed; and asked for again when it was taken away.
#   bash launch/tpu_pod.sh --name=t --zone=us-west4-a --type=v5e-64 --spot -- -m moe_embed.train --config=F.py --workdir=W
#   bash launch/tpu_pod.sh --name=t --zone=us-west4-a --delete         the TPU stands, and costs, until this
# --type is plan's name (v5e-64, v6e-8, v5p-64, v4-8); --project=P, else gcloud's own; --version=RUNTIME, else by the type;
# --dry-run prints every command and runs none. Said again, it finds the TPU and the run, and goes on following; Ctrl-C only stops that.
# It stays for as long as the run: in tmux, or under nohup. Tracked files go to the hosts as they are here. W is one place for all hosts: gs://BUCKET/PATH,
# in the TPU's region and open to its service account, or a folder that all mount. Exit status: the run's,
# 2 for a wrong argument, 1 where the TPU cannot be had or reached, 130 after Ctrl-C.
# 75, 76 and signals start the run again on the same TPU (launch/supervise.sh), at most RESTARTS (10) times; it continues by itself.
# POLL=30: seconds between two looks at the state of the TPU. Where gcloud or ssh fails it is tried again, after longer and longer pauses:
# for 10 POLLs, and 120 (an hour) from when all hosts have answered; then it stops following, with 1. SETTLE=160: seconds for the other
# hosts to end when the first has, or be stopped: a minute longer than jax needs to miss a killed process.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$here/launch/supervise.sh"
poll=${POLL:-30}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

refuse() {
    echo "error: $1" >&2
    exit 2
}
say() { echo "tpu_pod: $*" >&2; }

# ---- arguments
name='' zone='' type='' project='' version='' spot='' dry='' delete='' command=()
while [ $# -gt 0 ]; do
    case $1 in
        --name=?*) name=${1#*=} ;;
        --zone=?*) zone=${1#*=} ;;
        --type=?*) type=${1#*=} ;;
        --project=?*) project=${1#*=} ;;
        --version=?*) version=${1#*=} ;;
        --spot) spot=1 ;;
        --dry-run) dry=1 ;;
        --delete) delete=1 ;;
        --)
            shift
            command=("$@")
            break
            ;;
        *) refuse "tpu_pod.sh does not know $1; it takes --name= --zone= --type= --project= --version= --spot --dry-run --delete, then -- and the command." ;;
    esac
    shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then refuse "--name= and --zone= say which TPU; both are needed."; fi
if [ -z "$delete" ]; then
    if [ ${#command[@]} -eq 0 ]; then refuse "no command for python after --, as in: -- -m moe_embed.train --config=... --workdir=..."; fi
    case $type in # runtimes: cloud.google.com/tpu/docs/runtimes, the table for JAX
        v5e-[1-9]* | v5litepod-[1-9]*) type=v5litepod-${type#*-} runtime=v2-alpha-tpuv5-lite ;;
        v5p-[1-9]*) runtime=v2-alpha-tpuv5 ;;
        v6e-[1-9]*) runtime=v2-alpha-tpuv6e ;;
        v[234]-[1-9]*) runtime=tpu-ubuntu2204-base ;;
        *) refuse "--type=$type is no TPU that queued resources give; it is v5e-N, v5p-N, v6e-N, v4-N, v3-N or v2-N, as v5e-64." ;;
    esac
    version=${version:-$runtime}
elif [ ${#command[@]} -ne 0 ]; then
    refuse "--delete takes the TPU away; it runs no command."
fi
where=(--zone="$zone" ${project:+--project="$project"} --quiet)

# ---- gcloud, each call once
call() {
    if [ -n "$dry" ]; then
        local line=gcloud word
        for word in "$@"; do # as it could be typed
            if [[ $word =~ [^A-Za-z0-9_.,:=/@%+-] ]]; then word="'${word//\'/\'\\\'\'}'"; fi
            line+=" $word"
        done
        echo "$line"
    else
        gcloud "$@"
    fi
}
queue() { call compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
create() { queue create --node-id="$name" --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}; }
remove() { queue delete --force; }
# ServerAlive: a host that is taken away says no good-bye.
on() { # all|0 COMMAND
    call compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oConnectTimeout=30 --command="$2"
}
worker() { on "$1" "bash moe_embed/launch/tpu_worker.sh $2"; }
quoted=$(printf ' %q' ${command[@]+"${command[@]}"})
quoted=${quoted# }
archive=$scratch/moe_embed.tar.gz
if [ -n "$dry" ]; then archive=moe_embed.tar.gz; fi

patience=5 # failures of gcloud or ssh in a row that end it: 5 minutes; 16 and an hour from when all hosts have answered
outlast() { # FAILURES: after each in a row a longer pause; false where that is enough
    local i
    if [ "$1" -ge "$patience" ]; then return 1; fi
    for ((i = 0; i < $1; i++)); do sleep "$poll"; done
}

left() { # [STATUS]
    say "no longer following. The run goes on; the same command follows it again, --delete removes the TPU and all."
    exit "${1:-130}"
}
give_up() {
    if [ -n "${sent:-}" ]; then left 1; fi
    exit 1
}

look() { # tpu-vm|queued-resources FORMAT: the caller's `state` becomes what it is in, or ABSENT
    local failures=0
    while ! state=$(call compute tpus "$1" describe "$name" "${where[@]}" --format="$2" 2> "$scratch/why"); do
        if grep -q NOT_FOUND "$scratch/why"; then
            state=ABSENT
            return
        fi
        failures=$((failures + 1))
        say "$(head -n 1 "$scratch/why") ($failures of $patience in a row)"
        outlast "$failures" || give_up
    done
}

# ---- what it takes to run
active() { # comes back when the TPU is there and ready
    local state before='' failed=0 refused=0
    while :; do
        look queued-resources 'value(state.state)'
        if [ "$state" = ACTIVE ]; then # PREEMPTED is said of the node first
            look tpu-vm 'value(state)'
            if [ "$state" = ABSENT ]; then state="without its node"; fi
        fi
        if [ "$state" != "$before" ]; then say "$name is $state."; fi
        before=$state
        case $state in
            READY) return ;;
            ABSENT) # at first a refusal is final; afterwards it may be a quota that the last one has not yet given back
                create || { [ -n "$again" ] && outlast $((refused += 1)); } || exit 1
                sent='' seen=0 followed='' again=1 # whatever was there, these hosts have nothing
                ;;
            SUSPENDING | SUSPENDED | FAILED | PREEMPTED | TERMINATED | without*)
                if [ "$state" = FAILED ] && [ $((failed += 1)) -ge 3 ]; then
                    queue describe >&2
                    say "the request for $type failed $failed times in a row; what gcloud knows of it stands above."
                    exit 1
                fi
                remove || sleep "$poll"
                sent='' seen=0 followed='' again=1
                ;;
            *) sleep "$poll" ;; # in the queue, being made or being deleted
        esac
    done
}

send() { # the tracked files as they are, and what they need
    local tree untracked
    if [ -n "$dry" ]; then
        echo "git archive --format=tar.gz --output=$archive HEAD"
    else
        untracked=$(git -C "$here" ls-files --others --exclude-standard) || return
        if [ -n "$untracked" ]; then say "not sent, as git does not track it: ${untracked//$'\n'/, }"; fi
        tree=$(git -C "$here" stash create) || return # HEAD with the changes here; nothing where there are none
        git -C "$here" archive --format=tar.gz --output="$archive" "${tree:-HEAD}" || return
    fi
    call compute tpus tpu-vm scp "$archive" "$name:moe_embed.tar.gz" "${where[@]}" --worker=all || return
    # Of an older checkout only its own files go; a workdir may lie among them.
    on all 'mkdir -p moe_embed && cd moe_embed && if [ -f .sent ]; then xargs -d "\n" rm -f < .sent; fi && tar -xzf ../moe_embed.tar.gz && tar -tzf ../moe_embed.tar.gz | grep -v "/\$" > .sent && bash launch/tpu_worker.sh setup'
}

statuses() { # a line of every host's tpu_worker.sh; fails where one cannot be reached
    on all 'if [ -f moe_embed/launch/tpu_worker.sh ]; then bash moe_embed/launch/tpu_worker.sh status; else echo tpu_worker - none; fi' 2> "$scratch/why" > "$scratch/said" || return 1
    grep '^tpu_worker ' "$scratch/said"
}

follow() { # until the run ends or the line breaks
    local line
    while IFS= read -r line; do
        if [[ $line =~ ^tpu_worker\ line\ ([0-9]+)$ ]]; then
            seen=$((BASH_REMATCH[1] - 1))
        else
            printf '%s\n' "$line"
            seen=$((seen + 1))
        fi
    done < <(worker 0 "follow $1" 2> "$scratch/why")
}

settle() { # all hosts have ended, and `said` has their lines; false where one cannot be asked, or none has ended
    local until=$((SECONDS + ${SETTLE:-160}))
    while said=$(statuses) && grep -q '^tpu_worker [^ ]* running' <<< "$said"; do
        if ! grep -Eq '^tpu_worker [^ ]* (ended|none)' <<< "$said"; then return 1; fi # only the line to the log broke
        if [ "$SECONDS" -ge "$until" ]; then worker all stop; fi
        sleep 1
    done
    [ -n "$said" ]
}

verdict() { # one status of all hosts': what can be mended by running again, else the worst
    local codes code
    codes=$(sed -E 's/^tpu_worker [^ ]* ended ([0-9]+) .*/\1/; s/^tpu_worker.*none$/137/' <<< "$said" | sort -rn)
    for code in $codes; do
        if restartable "$code"; then
            echo "$code"
            return
        fi
    done
    head -n 1 <<< "$codes"
}

if [ -n "$dry" ]; then
    if [ -n "$delete" ]; then
        remove
        exit
    fi
    echo "# what is there, and if it is not:"
    queue describe --format='value(state.state)'
    create
    echo "# until it is ACTIVE and READY:"
    call compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)'
    send
    worker all "start $(printf %q "$quoted")"
    worker 0 "follow 1"
    worker all status
    echo "# when it is SUSPENDED, PREEMPTED or FAILED, and then from the top:"
    remove
    exit
fi
git -C "$here" rev-parse --quiet HEAD > /dev/null || refuse "$here is no git checkout, and what git tracks is what goes to the hosts."
command -v gcloud > /dev/null || refuse "there is no gcloud here; install Google Cloud's CLI, and log in."
if [ -n "$delete" ]; then
    look queued-resources 'value(state.state)'
    if [ "$state" = ABSENT ]; then
        say "there is no $name in $zone."
    else
        remove
        say "$name is gone."
    fi
    exit
fi

trap left INT TERM
# `sent`: the hosts have the checkout; `followed`: the run that ended there was looked at by this call, or begun by it
sent='' followed='' again='' seen=0 lost=0 unready=0 began=$SECONDS
while :; do
    active
    if ! said=$(statuses); then # taken away a moment ago, or not yet up
        lost=$((lost + 1))
        say "$name is READY, and not every host answers ($lost of $patience in a row)"
        if ! outlast "$lost"; then
            cat "$scratch/why" >&2
            give_up
        fi
        continue
    fi
    lost=0 patience=16 # pauses of 1 to 15 POLLs: an hour
    if grep -q '^tpu_worker [^ ]* none' <<< "$said"; then sent=''; fi # a host that has no run has lost its disk, or never had one
    if grep -q '^tpu_worker [^ ]* running' <<< "$said"; then
        other=$(sed -n 's/^tpu_worker [^ ]* running //p' <<< "$said")
        other=${other%%$'\n'*}
        if [ "$other" != "$quoted" ]; then
            refuse "$name runs another command: $other; wait for it, or remove it with --delete."
        fi
        if [ -z "$sent" ]; then
            say "the run is there; following it."
            sent=1
            follow 0
        else
            follow $((seen + 1))
        fi
    elif [ -n "$followed" ] && ! grep -Evq '^tpu_worker [^ ]* ended ' <<< "$said"; then
        : # it ended while a host could not be asked
    else
        if [ -z "$sent" ]; then
            if send; then sent=1; fi
        fi
        began=$SECONDS
        if [ -z "$sent" ] || ! worker all "start $(printf %q "$quoted")"; then # perhaps it is being taken away
            say "not every host could be set up and started."
            if [ $((unready += 1)) -ge 3 ]; then exit 1; fi
            sleep "$poll"
            continue
        fi
        unready=0
        follow $((seen + 1))
    fi
    followed=1
    if ! settle; then continue; fi # ssh broke: `active` will say why
    status=$(verdict)
    if [ "$status" -eq 0 ]; then
        say "done. $name stands, and costs, until --delete."
        exit 0
    elif once_more "$status" $((SECONDS - began)); then
        followed=''
        continue
    fi
    worker all tail >&2 || true
    cut -d' ' -f2-4 <<< "$said" >&2
    say "the run ended with $status. $name stands, and costs, until --delete."
    exit "$status"
done
