#!/usr/bin/env bash
# From a bare checkout to a fine-tuned language model on CPU, in about ten minutes after installation:
# SmolLM2-135M-Instruct learns arithmetic word problems with DFT, on Megatron's own training loop,
# tensor-parallel over three processes, and comes back as a Hugging Face checkpoint.
#
#   bash examples/quickstart.sh
#   bash examples/quickstart.sh --loss sft             other arguments go to the training command
#   bash examples/quickstart.sh --hf-model DIR_OR_NAME [--ranks N]
#
# Everything lands in runs/. It may be interrupted and run again: finished steps are kept.
set -euo pipefail
# shellcheck source=tools/setup_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/../tools/setup_env.sh"

model="" work=runs/quickstart
# SmolLM2-135M has 9 attention heads: three tensor-parallel ranks divide them, two do not.
ranks=3
extra=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit
            ;;
        --hf-model | --ranks)
            [ $# -gt 1 ] || die "$1: expected a value"
            if [ "$1" = --ranks ]; then
                ranks=$2
            else
                model=$2 work=runs/quickstart-$(basename "$2")
                [ ! -d "$model" ] || model=$(cd "$model" && pwd)
            fi
            shift
            ;;
        *) extra+=("$1") ;;
    esac
    shift
done

[[ $ranks =~ ^[1-9][0-9]{0,3}$ ]] || die "--ranks: expected a whole number above 0, got '$ranks'"
cd "$root"
setup_env quickstart
started=$SECONDS
here=examples/quickstart data=$work/data tuned=$work/tuned log=$work/train.log
steps=60 row_tokens=384
mkdir -p "$work"

# glibc gives every large buffer back to the kernel and takes page faults for the next one; keeping
# them makes a training step on CPU up to twice as fast.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
export TOKENIZERS_PARALLELISM=false

# kept FILE KEY: FILE was finished with the same inputs. keep FILE KEY: say so, last of all.
kept() { [ -e "$1" ] && [ "$(cat "$1.key" 2>/dev/null)" = "$2" ]; }
keep() { printf '%s\n' "$2" >"$1.key"; }

# score NAME MODEL KEY: exact match, cross entropy and target probability into $work/NAME.json
score() {
    local key
    key="$3 $(cat "$data/held_out.jsonl" "$here/evaluate.py" | sha256sum)"
    if kept "$work/$1.json" "$key"; then
        say "scores $1 training: kept"
        return
    fi
    say "scores $1 training, on held-out problems (a minute or two)"
    "$python" "$here/evaluate.py" --model "$2" --data "$data/held_out.jsonl" --out "$work/$1.json"
    keep "$work/$1.json" "$key"
}

if [ -z "$model" ]; then
    model=$work/model
    say "model: SmolLM2-135M-Instruct"
    "$python" "$here/model.py" --out "$model"
    export HF_HUB_OFFLINE=1
fi

say "data: word problems from a seed"
"$python" "$here/arithmetic.py" --out "$data" --train 800 --held-out 150

score before "$model" "$model"

device=(--device cpu)
[[ " ${extra[*]:-}" != *" --device"* ]] || device=()
train=(
    --hf-model "$model" --loss dft --train-data "$data/train.jsonl" --data-cache "$work/cache"
    --tensor-model-parallel-size "$ranks" --seq-length "$row_tokens"
    --micro-batch-size 1 --global-batch-size 1 --train-iters "$steps"
    --lr 5e-5 --min-lr 5e-6 --lr-decay-style cosine --lr-warmup-iters 6
    --weight-decay 0.01 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 1
    --log-interval 1 --eval-iters 0 --save-hf "$tuned" --overwrite
    "${device[@]}" "${extra[@]}"
)
key="$ranks ${train[*]} $(sha256sum <"$data/train.jsonl")"
if kept "$tuned" "$key"; then
    say "training: kept ($tuned)"
else
    say "training: $steps steps on $ranks processes"
    rm -f "$tuned.key" "$log"
    train_started=$SECONDS
    "$python" -m megatron_dft.cli train --nproc-per-node "$ranks" --megatron-log "$log" "${train[@]}" ||
        die "training failed; its own line above says why, $log has the rest"
    echo $((SECONDS - train_started)) >"$work/train.seconds"
    keep "$tuned" "$key"
fi

score after "$tuned" "$key"
"$python" "$here/table.py" --work "$work" --row-tokens "$row_tokens" --seconds $((SECONDS - started))
