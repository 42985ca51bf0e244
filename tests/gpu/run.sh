#!/usr/bin/env bash
# The suite for a machine with one Hopper GPU; no network is needed, 7 minutes at most.
#
#   bash tests/gpu/run.sh                        sections start parity heads train
#   bash tests/gpu/run.sh --out DIR parity       one section; logs, figures and results.json in DIR
#   bash tests/gpu/run.sh --dry-run              every command, and nothing is run
#
# Packages: those of the Python that PYTHON names (default: python3), or, where that has no Megatron,
# those of the directory GPU_SITE with its unpack.sh and env.sh.
# Status: 0 if all holds, 1 if not, 3 where there is no GPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3} out='' arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
cd "$root"

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

if ! has megatron && [ -n "${GPU_SITE:-}" ]; then
    [ -e /tmp/site/megatron ] || SPLIT=1 bash "$GPU_SITE/unpack.sh"
    export SITE=/tmp/site_te:/tmp/site
    # shellcheck disable=SC1091 # comes with the packages
    . "$GPU_SITE/env.sh"
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=2
# Single precision is single precision: TF32 would hide what is compared.
export NVIDIA_TF32_OVERRIDE=0

case " ${arguments[*]-} " in
    *" --dry-run "*) exec "$python" -m tests.gpu.suite "${out:-OUT}" "${arguments[@]}" ;;
esac
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "tests/gpu/run.sh: no GPU is visible; nothing was run (--dry-run shows what would be)"
    exit 3
fi
out=${out:-$(mktemp -d "${TMPDIR:-/tmp}/megatron_dft_gpu.XXXXXX")}
echo "results: $out"
exec "$python" -m tests.gpu.suite "$out" ${arguments[@]+"${arguments[@]}"}
