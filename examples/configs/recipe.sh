# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# The recipe of the DFT paper (arXiv 2508.05629, section 4.1): AdamW 0.9/0.95, weight decay 0.01, clip 1.0,
# lr 5e-5, batch 256 conversations, cosine with a tenth of warm-up, one epoch of NuminaMath-CoT 100k, bf16.
#
# Rows are packed: one of 4,096 tokens holds about 8 conversations of that set, so 32 rows are a batch of
# 256 and 391 steps an epoch. `megatron-dft inspect-data` tells the numbers of other data.

LOSS=${LOSS:-dft}
LR=${LR:-5e-5}
STEPS=${STEPS:-391}
SEQ_LENGTH=${SEQ_LENGTH:-4096}
ROWS=${ROWS:-32}
TRAIN_DATA=${TRAIN_DATA:?expected the training data: TRAIN_DATA=train.jsonl sbatch …}
configs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

RECIPE=(
    --loss "$LOSS" --train-data "$TRAIN_DATA" --seq-length "$SEQ_LENGTH"
    --micro-batch-size 1 --global-batch-size "$ROWS" --train-iters "$STEPS"
    --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.1
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.01 --clip-grad 1.0 --bf16
    # Master weights and Adam's moments are shared out over the replicas; both transfers overlap.
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    # The optimizer's state can be read back at another TP, PP or DP: on fewer nodes, say.
    --dist-ckpt-optim-fully-reshardable
    --save-interval 50 --keep-last 2
    # For `megatron-dft compare` and TensorBoard.
    --tensorboard-dir "${RUN_DIR:?expected where the run is kept; the launching scripts set it}/tensorboard"
    --log-interval 1
)
# Held out: a file, or a share of the training data that no run with the same data trains on.
if [ -n "${VALID_DATA:-}" ]; then
    RECIPE+=(--valid-data "$VALID_DATA")
else
    RECIPE+=(--valid-share "${VALID_SHARE:-0.01}")
fi
# All of it each time.
RECIPE+=(--eval-interval "${EVAL_INTERVAL:-50}")
