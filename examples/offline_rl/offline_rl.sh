#!/usr/bin/env bash
# Offline RL in miniature, on two cores: sample from a model, keep what verifies, train on it with DFT and
# with SFT, and compare both with the start. SmolLM2-135M-Instruct, arithmetic word problems.
#
#   bash examples/offline_rl/offline_rl.sh
#
# 1. start   a few steps of SFT on 24 worked problems: the model learns to answer in the asked form
# 2. sample  4 answers at temperature 1 to each of 200 other problems; kill -9 in the middle, and on again
# 3. verify  the answers behind #### are compared with the right ones; right ones are kept
# 4. train   offline DFT and SFT on the same kept samples, the same steps, each at three learning rates
# 5. choose  each method's best rate, by its answers to 50 more problems in the training's words
# 6. score   exact match on 100 held-out problems in other words: sampled (Avg@2) and greedy
#
# Everything lands in runs/offline_rl. It may be interrupted and run again: finished steps are kept.
set -euo pipefail
case ${1:-} in
    -h | --help)
        sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
esac
# shellcheck source=tools/setup_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../tools/setup_env.sh"
cd "$root"
setup_env quickstart
started=$SECONDS
work=${WORK:-runs/offline_rl} quick=examples/quickstart
demonstrations=24 problems=200 choosing=50 held_out=100 warm_steps=8 steps=30
rates=(5e-5 1e-4 2e-4)
mkdir -p "$work"

# glibc gives every large buffer back to the kernel and takes page faults for the next one.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
# On a CPU that multiplies bfloat16 in hardware, answers come two to three times as fast.
dtype=float32
if grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null; then dtype=bfloat16; fi
# Two processes of one thread do more than one of two: a decoding step is small.
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

dft() { "$python" -m megatron_dft.cli "$@"; }

# train NAME MODEL DATA LOSS RATE STEPS THREADS
train() {
    if [ -e "$work/$1/done" ]; then
        say "$1: kept"
        return
    fi
    say "$1: $6 steps of $4 at $5 (log: $work/$1.log)"
    OMP_NUM_THREADS=$7 dft train --hf-model "$2" --loss "$4" --train-data "$3" --device cpu \
        --seq-length 384 --micro-batch-size 1 --global-batch-size 1 --train-iters "$6" \
        --lr "$5" --min-lr 5e-6 --lr-decay-style cosine --lr-warmup-fraction 0.1 \
        --weight-decay 0.01 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 1 \
        --log-interval 1 --eval-iters 0 --save-hf "$work/$1" --overwrite >"$work/$1.log" 2>&1 ||
        die "$1 failed; the end of $work/$1.log: $(tail -n 20 "$work/$1.log")"
    touch "$work/$1/done"
}

sample=(
    sample --model "$work/start" --prompts "$work/problems.jsonl"
    --samples 4 --temperature 1 --max-tokens 40 --batch-size 60 --device cpu --dtype "$dtype"
)
# draw DIR: two processes fill it together
draw() {
    local first
    dft "${sample[@]}" --out "$1" --part 0/2 &
    first=$!
    dft "${sample[@]}" --out "$1" --part 1/2
    wait "$first"
}
samples_of() { cat "$1"/samples.*.jsonl | sort; }

[ -d "$work/model" ] || "$python" "$quick/model.py" --out "$work/model"
export HF_HUB_OFFLINE=1
"$python" "$quick/arithmetic.py" --out "$work" --train $((demonstrations + problems + choosing)) \
    --held-out "$held_out" >"$work/data.log"
head -n "$demonstrations" "$work/train.jsonl" >"$work/demonstrations.jsonl"
tail -n "$choosing" "$work/train.jsonl" >"$work/choosing.jsonl"
sed -n "$((demonstrations + 1)),$((demonstrations + problems))p" "$work/train.jsonl" \
    >"$work/problems.jsonl"

train start "$work/model" "$work/demonstrations.jsonl" sft 5e-5 "$warm_steps" 2

if [ ! -e "$work/samples/drawn" ]; then
    say "samples: kill -9 as soon as the first are stored"
    # Not through the function: the signal has to reach the program itself.
    "$python" -m megatron_dft.cli "${sample[@]}" --out "$work/samples" --part 0/2 &
    victim=$!
    until [ -s "$work/samples/samples.0-of-2.jsonl" ] || ! kill -0 "$victim" 2>/dev/null; do
        sleep 0.2
    done
    kill -9 "$victim" || true
    wait "$victim" || true
    say "killed at $(samples_of "$work/samples" | wc -l) samples; on again, and beside it without a kill:"
    dft "${sample[@]}" --out "$work/samples_unbroken" --part 0/2 &
    unbroken=$!
    draw "$work/samples"
    wait "$unbroken"
    touch "$work/samples/drawn"
fi
cmp <(sort "$work/samples/samples.0-of-2.jsonl") <(samples_of "$work/samples_unbroken") ||
    die "the killed run has other samples than the unbroken one"
say "killed and unbroken: the same $(samples_of "$work/samples_unbroken" | wc -l) samples"

verifier=(--verifier exact --marker '####')
dft verify "$work/samples" "${verifier[@]}" --keep correct --out "$work/kept.jsonl"

for rate in "${rates[@]}"; do
    train "dft-$rate" "$work/start" "$work/kept.jsonl" dft "$rate" "$steps" 1 &
    dft_run=$!
    train "sft-$rate" "$work/start" "$work/kept.jsonl" sft "$rate" "$steps" 1
    wait "$dft_run"
done

# score DIR SET MODELS… -- FLAG…: two processes draw, then the scores come
score() {
    local out=$work/$1 set=$1=$work/$2.jsonl first models=()
    shift 2
    while [ "$1" != -- ]; do
        models+=("$1")
        shift
    done
    local evaluate=(
        evaluate --models "${models[@]}" --sets "$set" --max-tokens 40 --batch-size 50 --device cpu
        --dtype "$dtype" "${verifier[@]}" --out "$out" "${@:2}"
    )
    dft "${evaluate[@]}" --part 0/2 &
    first=$!
    dft "${evaluate[@]}" --part 1/2
    wait "$first"
    dft "${evaluate[@]}"
}
best_rate() {
    "$python" - "$work/choice/scores.json" "$1" <<'END'
import json, sys

scores = json.load(open(sys.argv[1]))["scores"]
rates = {name: by_set["choice"]["avg@2"]["value"] for name, by_set in scores.items()}
print(max((r for r in rates if r.startswith(sys.argv[2])), key=rates.get).split("-", 1)[1])
END
}
candidates=()
for rate in "${rates[@]}"; do
    candidates+=("sft-$rate=$work/sft-$rate" "dft-$rate=$work/dft-$rate")
done
say "the rates, on problems that no test holds"
score choice choosing "${candidates[@]}" -- --samples 2 --temperature 1
best_sft=$(best_rate sft) best_dft=$(best_rate dft)
say "the best: sft at $best_sft, dft at $best_dft"
tested=("start=$work/start" "sft=$work/sft-$best_sft" "dft=$work/dft-$best_dft")
say "scores, sampled at temperature 1"
score sampled held_out "${tested[@]}" -- --samples 2 --temperature 1
say "scores, greedy"
score greedy held_out "${tested[@]}" -- --samples 1 --temperature 0
say "$(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s; everything is in $work"
say "processor time, of this shell and of all it started (user, system):"
times
