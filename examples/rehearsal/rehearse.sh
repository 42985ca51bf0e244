# shellcheck shell=bash disable=SC2031
# A configuration rehearsed on CPU processes: its family and its flags, with a tiny random model, made rows, three
# steps, and every way of parallelism that it has at size 2. Sourced; needs `die`, `home` and `RUN_DIR`.

# begin_rehearsal CONFIG: makes the stand-in and sets what the configuration asks of the environment.
begin_rehearsal() {
    local config=$1 name
    name=$(model_of "$config") || die "$config failed"
    [ -n "$name" ] || die "$config: expected --hf-model in TRAIN_ARGS, got none"
    say_rehearsal "$name: a tiny random model of its family in $RUN_DIR/stand-in"
    if [ ! -f "$RUN_DIR/stand-in/rows.jsonl" ]; then
        "${PYTHON:-$home/.venv/bin/python}" "$home/examples/rehearsal/stand_in.py" "$name" --out "$RUN_DIR/stand-in" \
            >"$RUN_DIR/stand-in.log" 2>&1 || die "no stand-in for $name: $(tail -n 1 "$RUN_DIR/stand-in.log")"
    fi
    export MODEL=$RUN_DIR/stand-in/model TRAIN_DATA=$RUN_DIR/stand-in/rows.jsonl VALID_DATA='' VALID_SHARE=0.2
    export STEPS=3 SEQ_LENGTH=256 ROWS=4 EVAL_INTERVAL=2 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
    # oneDNN takes AMX instructions that some virtual machines announce and do not have.
    export ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
}

# model_of CONFIG: its own --hf-model. In a shell apart: what else it takes from the environment is decided later.
# shellcheck disable=SC2030,SC2031
model_of() (
    unset MODEL
    TRAIN_DATA=x TRAIN_ARGS=()
    # shellcheck source=/dev/null
    . "$1" && value_of --hf-model "${TRAIN_ARGS[@]}"
)

say_rehearsal() { printf '> rehearsal: %s\n' "$*"; }

# value_of FLAG WORD…: what follows the flag.
value_of() {
    local flag=$1
    shift
    while [ $# -gt 1 ]; do
        if [ "$1" = "$flag" ]; then echo "$2" && return; fi
        shift
    done
}

# shrink_layout: no size in TRAIN_ARGS above 2, and no kernel of a GPU; `ranks` is what that needs.
shrink_layout() {
    local flag size product=1 word kept=()
    for word in "${TRAIN_ARGS[@]}"; do
        if [ "$word" = --moe-grouped-gemm ]; then
            say_rehearsal "without $word, which is a GPU's"
        else
            kept+=("$word")
        fi
    done
    TRAIN_ARGS=("${kept[@]}" --device cpu)
    for flag in --tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size \
        --expert-model-parallel-size; do
        size=$(value_of "$flag" "${kept[@]}")
        [ "${size:-1}" -gt 1 ] || continue
        [ "$size" -le 2 ] || TRAIN_ARGS+=("$flag" 2)
        [ "$flag" = --expert-model-parallel-size ] || product=$((product * 2))
    done
    # One replica would leave the distributed optimizer and the experts nothing to share out.
    if [ "$product" -ge 2 ]; then ranks=$product; else ranks=2; fi
    say_rehearsal "$ranks CPU processes"
}
