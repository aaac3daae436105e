# shellcheck shell=bash
# Sourced by the launch scripts: `ready_venv [extra ...]` makes or completes .venv and puts it on PATH.
# A stamp of what was asked for decides whether there is anything to do, so a second run starts at once.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# Who names no Python gets that of the .venv which is there: one made by PYTHON=python3.12 is not made anew for another python3.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then PYTHON=.venv/bin/python; fi
fi

ready_venv() {
    local python=$PYTHON extras version said stamp start=$SECONDS
    extras=$(IFS=,; echo "$*")
    version=$("$python" -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14); print(*sys.version_info[:2], sep=".")' 2>/dev/null) || {
        said=$("$python" --version 2>&1) || said="nothing that runs (${said%%$'\n'*})" # as a shim for a version that is not chosen
        echo "error: $python is $said; set PYTHON to a Python of 3.11 to 3.13." >&2
        exit 2
    }
    stamp="$version $(cat requirements.txt pyproject.toml tests/constraints.txt | cksum)"
    if [ "$(cat ".venv/stamp-$extras" 2>/dev/null)" != "$stamp" ]; then
        echo "setting up .venv for Python $version ..."
        if [ "$(.venv/bin/python -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)" != "$version" ]; then
            "$python" -m venv --clear .venv || exit 1
        fi
        set -- --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
        # Only Python 3.11 has a CPU build under the pinned number (tests/constraints.txt).
        if [ "$version" = 3.11 ]; then set -- "$@" -c tests/constraints.txt; fi
        .venv/bin/python -m pip install "$@" || exit 1
        echo "$stamp" > ".venv/stamp-$extras"
        echo "installed in $((SECONDS - start)) s, .venv is $(du -sm .venv | cut -f1) MB."
    fi
    PATH=$PWD/.venv/bin:$PATH
    # XLA's CPU client frees its buffers after each call. What glibc hands back to the kernel is cleared anew when the next call
    # wants it (up to a third of the time, measured): so huge pages, and one heap that keeps buffers below 64 MiB.
    local keep=glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=67108864:glibc.malloc.trim_threshold=268435456
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:$keep}
}
