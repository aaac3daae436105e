# Sourced by the launch scripts: `ready_venv [extra ...]` makes or completes .venv and puts it on PATH.
# A stamp of what was asked for decides whether there is anything to do, so a second run starts at once.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

ready_venv() {
    local python=${PYTHON:-python3} extras stamp
    extras=$(IFS=,; echo "$*")
    stamp=$(cat requirements.txt pyproject.toml tests/constraints.txt <(echo "$extras") <("$python" --version) | sha256sum)
    if [ "$(cat ".venv/stamp-$extras" 2>/dev/null)" != "$stamp" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $("$python" --version) is too old; set PYTHON to a Python of 3.11 to 3.13." >&2
            exit 2
        }
        echo "setting up .venv for $("$python" --version) ..."
        local start=$SECONDS constraints=()
        [ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
        # Only Python 3.11 has a CPU build under the pinned number (tests/constraints.txt).
        .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && constraints=(-c tests/constraints.txt)
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "${constraints[@]}" -e ".${extras:+[$extras]}" || exit 1
        echo "$stamp" > ".venv/stamp-$extras"
        echo "installed in $((SECONDS - start)) s, .venv is $(du -sm .venv | cut -f1) MB."
    fi
    PATH=$PWD/.venv/bin:$PATH
    # Freed memory goes back to the kernel page by page, and each step faults it in again: huge pages, a quarter faster.
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
}
