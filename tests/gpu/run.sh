#!/usr/bin/env bash
# The suite for a machine with one Hopper GPU; no network is needed, 7 minutes at most.
#
#   bash tests/gpu/run.sh                        sections start parity train heads
#   bash tests/gpu/run.sh --out DIR parity       one section; logs, figures and results.json in DIR
#   bash tests/gpu/run.sh --dry-run              every command, and nothing is run
#   bash tests/gpu/run.sh --rehearse             without a GPU: every line that a CPU can run, at tiny
#                                                shapes, judged as on a GPU
#
# Packages: those of the Python that PYTHON names (default: .venv's, where there is one, or python3), or,
# where that has no Megatron, those of the directory GPU_SITE with its unpack.sh and env.sh (default: a
# gpu_site beside or above the checkout).
# Status: 0 if all holds, 1 if not, 2 without Megatron, 3 where there is no GPU.
set -euo pipefail
SECONDS=0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$root/.venv/bin/python out='' arguments=()
[ -x "$python" ] || python=python3
python=${PYTHON:-$python}
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
cd "$root"

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
given() { case " ${arguments[*]-} " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

if ! given --dry-run && ! given --rehearse &&
    ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "tests/gpu/run.sh: no GPU is visible; nothing was run (--dry-run shows what would be," \
        "--rehearse runs what a CPU can)"
    exit 3
fi
if ! has megatron; then
    for place in "${GPU_SITE:-}" "$root"/gpu_site "$root"/*/gpu_site "$root"/../*/gpu_site; do
        [ -f "$place/unpack.sh" ] || continue
        [ -e /tmp/site/.done ] || { SPLIT=1 bash "$place/unpack.sh" && touch /tmp/site/.done; }
        export SITE=/tmp/site_te:/tmp/site
        # shellcheck disable=SC1091 # comes with the packages
        . "$place/env.sh"
        break
    done
    has megatron || { echo "tests/gpu/run.sh: $python has no Megatron, and there is no" \
        "GPU_SITE with packages"; exit 2; }
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
# Single precision is single precision: TF32 would hide what is compared.
export NVIDIA_TF32_OVERRIDE=0
# Fourteen processes at once, each with a compiler pool of all cores, would wait for each other.
export TORCHINDUCTOR_COMPILE_THREADS=1

if given --dry-run; then
    exec "$python" -m tests.gpu.suite "${out:-OUT}" "${arguments[@]}"
fi
out=${out:-$(mktemp -d "${TMPDIR:-/tmp}/megatron_dft_gpu.XXXXXX")}
echo "results: $out"
exec "$python" -m tests.gpu.suite "$out" --spent "$SECONDS" ${arguments[@]+"${arguments[@]}"}
