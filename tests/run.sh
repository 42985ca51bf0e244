#!/usr/bin/env bash
# Sets up the checkout where needed, then runs every check and the tests; arguments go to pytest.
#
#   bash tests/run.sh                     everything but the slow tests
#   bash tests/run.sh tests/losses -x     the checks, and these tests alone
#
# Exit status 0 only where all of it is green. The last line is pytest's own closing line.
set -euo pipefail
# shellcheck source=tools/setup_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/../tools/setup_env.sh"
cd "$root"
setup_env test

# Two cores are shared by the ranks of a test: a thread pool in each would only fight over them.
export OMP_NUM_THREADS=1
export PATH=$venv/bin:$PATH
red=()

check() {
    local name=$1
    shift
    say "$name"
    "$@" || red+=("$name")
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "lint-imports" lint-imports
if command -v shellcheck >/dev/null; then
    mapfile -t scripts < <(git ls-files '*.sh' '*.sbatch' .ci/run 2>/dev/null)
    check "shellcheck" shellcheck -x "${scripts[@]}"
fi
check "doctests of megatron_dft/losses" \
    python -m pytest --durations-min=10 --doctest-modules megatron_dft/losses

if [ ${#red[@]} -gt 0 ]; then
    say "RED so far: $(printf '%s; ' "${red[@]}")the exit status will be 1 whatever the tests say"
fi
say "pytest $*"
status=0
# A worker a core, since many tests wait for something else; a few are not worth its start. A file stays
# with one worker: the virtual Slurm cluster, of which there can be one, and what a module has set up.
[ $# -gt 0 ] || set -- -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
python -m pytest "$@" || status=$?
[ "$status" -ne 0 ] || [ ${#red[@]} -eq 0 ] || status=1
exit "$status"
