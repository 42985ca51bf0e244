#!/usr/bin/env bash
# The paper's experiment (arXiv 2508.05629) on one node of 8 H100: Qwen2.5-Math-1.5B, fine-tuned on
# NuminaMath-CoT 100k with SFT and DFT, and with DFT on its own verified samples (offline RL); then Avg@16 on
# Math500, Minerva, Olympiad, AIME24 and AMC23, all side by side.
#
#   bash examples/math/math.sh                 needs vLLM, math-verify, and the hub for model and data
#   bash examples/math/math.sh --rehearse      every step on this CPU: a tiny random model, 50 made rows
#
# Environment: MODEL, WORK (runs/math), GPUS (8), PYTHON. The recipe is examples/configs/recipe.sh. It may be
# interrupted and run again: finished steps are kept, training and sampling go on where they stopped.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"
python=${PYTHON:-$root/.venv/bin/python}
say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

model=${MODEL:-Qwen/Qwen2.5-Math-1.5B} work=${WORK:-runs/math} gpus=${GPUS:-8}
# NuminaMath has a few solutions beyond a row; both kinds of tuning leave them out.
data=() extra=(--overlong drop) backend=(--backend vllm) keep=(--keep correct)
# The model sees 4,096 tokens; the longest prompts of the sets take most of the rest.
tokens=3072 k=16 row_tokens=4096 rows=32
case ${1:-} in
    "") ;;
    --rehearse)
        work=${WORK:-runs/math-rehearsal} gpus=2
        [ -d "$work/model" ] || "$python" examples/math/tiny_model.py --out "$work/model"
        model=$work/model data=(--rehearse)
        # A random model is never right: its best samples stand in for the right ones.
        keep=(--keep best --keep-cut)
        backend=(--backend transformers --device cpu --batch-size 16)
        tokens=12 k=2 row_tokens=512 rows=2
        export PROCS_PER_NODE=1 STEPS=3 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
        # oneDNN takes AMX instructions that some virtual machines announce and do not have.
        export ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
        extra+=(--device cpu)
        ;;
    -h | --help)
        sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
    *) die "$1: expected --rehearse, or nothing" ;;
esac
mkdir -p "$work"
work=$(cd "$work" && pwd -P)
export PYTHON=$python MODEL=$model SEQ_LENGTH=$row_tokens ROWS=$rows
dft() { "$python" -m megatron_dft.cli "$@"; }

# on_every_gpu WORD…: a command with --part, a process a GPU; all of them fill one directory.
on_every_gpu() {
    local i pids=() failed=0
    for ((i = 0; i < gpus; i++)); do
        CUDA_VISIBLE_DEVICES=$i "$python" -m megatron_dft.cli "$@" --part "$i/$gpus" &
        pids+=($!)
    done
    for i in "${pids[@]}"; do wait "$i" || failed=1; done
    [ "$failed" = 0 ] || die "$1 failed on a GPU; its words stand above"
}

# steps_of FILE: one epoch of packed rows.
steps_of() {
    dft inspect-data --tokenizer "$model" --train-data "$1" --seq-length "$row_tokens" \
        --json "$work/inspect.json" >/dev/null
    "$python" -c "import json, sys; print(max(1, json.load(open(sys.argv[1]))['packed_rows'] // $rows))" \
        "$work/inspect.json"
}

# train NAME LOSS FILE
train() {
    if [ -e "$work/$1/finished" ]; then
        say "$1: kept"
        return
    fi
    local steps=${STEPS:-}
    [ -n "$steps" ] || steps=$(steps_of "$3")
    say "$1: $2, $steps steps (log: $work/$1.log)"
    RUN_DIR=$work/$1 LOSS=$2 TRAIN_DATA=$3 STEPS=$steps bash examples/local.sh \
        examples/configs/qwen2.5-math-1.5b.sh "${extra[@]}" >"$work/$1.log" 2>&1 ||
        die "$1 failed; the end of $work/$1.log: $(tail -n 20 "$work/$1.log")"
    touch "$work/$1/finished"
}

if [ ! -e "$work/data/finished" ]; then
    say "data"
    "$python" examples/math/data.py --out "$work/data" "${data[@]}"
    touch "$work/data/finished"
fi

train sft sft "$work/data/train.jsonl"
train dft dft "$work/data/train.jsonl"

say "own samples: 4 to each training question"
sampling=("${backend[@]}" --temperature 1 --max-tokens "$tokens")
if [ ! -e "$work/samples/finished" ]; then
    on_every_gpu sample --model "$model" --prompts "$work/data/train.jsonl" --out "$work/samples" \
        --samples 4 "${sampling[@]}"
    touch "$work/samples/finished"
fi
[ -e "$work/kept.jsonl" ] ||
    dft verify "$work/samples" --verifier math --time-limit 20 "${keep[@]}" --out "$work/kept.jsonl"
train offline_dft dft "$work/kept.jsonl"

say "Avg@$k on five sets"
sets=()
for name in math500 minerva olympiad aime24 amc23; do sets+=("$name=$work/data/$name.jsonl"); done
evaluate=(
    evaluate --models base="$model" sft="$work/sft/hf" dft="$work/dft/hf"
    offline_dft="$work/offline_dft/hf" --sets "${sets[@]}" --samples "$k" "${sampling[@]}"
    --verifier math --time-limit 20 --out "$work/scores"
)
on_every_gpu "${evaluate[@]}"
dft "${evaluate[@]}"
say "done: $work/scores"
