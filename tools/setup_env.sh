# shellcheck shell=bash
# Sourced by tests/run.sh and examples/quickstart.sh: from a bare checkout to a ready `.venv`.
#
#   setup_env EXTRA…   finds Python 3.12+, makes `.venv`, installs the package with these extras
#
# Everything lies in the checkout. A stamp written last says which set-up is complete, so an interrupted
# run is taken up again and a finished one costs nothing. PYTHON=/path/to/python overrides the search.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python

say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# True where $1 runs, is 3.12 or newer, and can make virtual environments (Debian splits ensurepip off).
usable_python() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

# Prints the first usable Python. The tested version leads; pyenv answers for the checkout's
# .python-version only inside the checkout, hence the cd.
find_python() {
    local candidate
    cd "$root" || return 1
    if [ -n "${PYTHON:-}" ]; then
        usable_python "$PYTHON" || die "PYTHON=$PYTHON: expected Python 3.12 or newer with venv and" \
            "ensurepip; unset PYTHON or name another"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.12 python3 python3.13 python3.14 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        if usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.12 or newer with venv found. Get one by 'pyenv install 3.12', by" \
        "'apt-get install python3.12 python3.12-venv', or from https://www.python.org/downloads/," \
        "then run this again (or name it: PYTHON=/path/to/python3.12)"
}

# pip's lines that matter: what it downloads and installs, and every warning or error.
pip_lines() {
    sed -u -E \
        -e '/^(WARNING: Location .* is ignored|Looking in |Obtaining |Collecting |Requirement already )/d' \
        -e '/^ +(Installing build |Checking if build |Getting requirements |Preparing (editable )?meta)/d' \
        -e '/^ *(Building (editable|wheel)|Created wheel|Successfully built|Stored in|Attempting un|Found exist|Uninst|Success.* uninst)/d' \
        -e 's/^(Installing collected packages):.*/\1; the big ones take a minute or two/' \
        -e 's/^(Successfully installed) .*/\1/'
}

setup_hash() {
    cat "$root/setup.py" - <<<"$root $("$python" --version)" | sha256sum | cut -d' ' -f1
}

setup_env() {
    local extra missing="" base extras
    # Two set-ups at once would write over each other. This file serves as the lock: nothing to clean up.
    exec 9<"$root/tools/setup_env.sh"
    if ! flock -n 9; then
        say "another set-up of this checkout is running; waiting for it"
        flock 9
    fi
    if ! usable_python "$python"; then
        base=$(find_python) || exit 1
        say "making .venv with $("$base" --version) ($(command -v "$base"))"
        rm -rf "$venv"
        "$base" -m venv "$venv"
    fi
    for extra in "$@"; do
        [ "$(cat "$venv/.ready-$extra" 2>/dev/null)" = "$(setup_hash)" ] || missing+=",$extra"
    done
    if [ -n "$missing" ]; then
        extras=${missing#,}
        say "installing megatron-dft[$extras] into .venv (5.5 GB the first time: 2 to 10 minutes)"
        "$python" -m pip install --disable-pip-version-check --progress-bar off \
            -e "${root}[$extras]" 2>&1 | pip_lines ||
            die "pip failed (its own words are above); when they are dealt with, run this again"
        for extra in ${extras//,/ }; do
            setup_hash >"$venv/.ready-$extra"
        done
    fi
    flock -u 9
    exec 9>&-
    say "ready: .venv, $("$python" --version), extras: $*"
}
