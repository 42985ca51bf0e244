#!/usr/bin/env bash
# A cluster configuration on this machine, without Slurm: all its GPUs, or CPU processes for a rehearsal.
#
#   TRAIN_DATA=train.jsonl bash examples/local.sh examples/configs/qwen2.5-math-1.5b.sh [FLAG…]
#   TRAIN_DATA=train.jsonl PROCS_PER_NODE=4 MODEL=tiny bash examples/local.sh CONFIG --device cpu [FLAG…]
#   bash examples/local.sh --dry-run CONFIG [FLAG…]
#   bash examples/local.sh --rehearse CONFIG [FLAG…]      three steps on this CPU with a tiny model of the family
#
# FLAGs come after the configuration's: the last one of a kind counts. Ctrl-C stops at once; SIGUSR1 to a rank,
# or `touch RUN_DIR/stop`, stops after the step with a checkpoint. The same command again goes on from there.
set -euo pipefail

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}
dry_run=0 rehearse=0
if [ "${1:-}" = --dry-run ]; then dry_run=1 && shift; fi
if [ "${1:-}" = --rehearse ]; then rehearse=1 && shift; fi
config=${1:-}
[ -f "$config" ] || die "expected a configuration such as examples/configs/qwen2.5-math-1.5b.sh, got '$config'"
shift

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=examples/slurm/guard.sh
. "$home/examples/slurm/guard.sh"
name=$(plain_name "$(basename "$config" .sh)")
if [ "$rehearse" = 1 ]; then name=rehearsal/$name; fi
export RUN_DIR=${RUN_DIR:-$home/runs/$name}
anchor RUN_DIR
# shellcheck source=examples/slurm/environment.sh
. "$home/examples/slurm/environment.sh"
if [ "$rehearse" = 1 ]; then
    # shellcheck source=examples/rehearsal/rehearse.sh
    . "$home/examples/rehearsal/rehearse.sh"
    mkdir -p "$RUN_DIR"
    begin_rehearsal "$config"
fi
TRAIN_ARGS=()
# shellcheck source=/dev/null
. "$config"
[ ${#TRAIN_ARGS[@]} -gt 0 ] || die "$config: expected the array TRAIN_ARGS, got none"

anchor PYTHON HF_HOME MEGATRON_DFT_DATA_CACHE
if [ "$rehearse" = 1 ]; then shrink_layout && PROCS_PER_NODE=$ranks; fi
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
procs=$(whole PROCS_PER_NODE "${PROCS_PER_NODE:-$gpus}") || exit
[ "$procs" -gt 0 ] || die "no GPU here: add --device cpu and say how many ranks, PROCS_PER_NODE=4"

from_here "${TRAIN_ARGS[@]}" "$@"
command=(
    "${PYTHON:-$home/.venv/bin/python}" -m megatron_dft.cli train --nproc-per-node "$procs"
    --megatron-log "$RUN_DIR/megatron.log" --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints"
    --save-hf "$RUN_DIR/hf" --overwrite --stop-file "$RUN_DIR/stop" "${anchored[@]}"
)
hide "${command[@]}"
if [ "$dry_run" = 1 ]; then
    echo "${shown[*]}"
    cd "$home"
    # What training would refuse, it refuses here.
    exec "${command[@]}" --dry-run --check-rows 256
fi
mkdir -p "$RUN_DIR"
# The launcher takes this process over: the run ends the ownership by its own end.
own "$RUN_DIR"
rm -f "$RUN_DIR/stop"
(umask 077 && rm -f "$RUN_DIR"/{command,config.sh} && echo "${shown[*]}" >"$RUN_DIR/command" &&
    cp "$config" "$RUN_DIR/config.sh" && chmod 600 "$RUN_DIR/config.sh")
cd "$home"
MEGATRON_DFT_STATUS=$RUN_DIR/status exec "${command[@]}"
