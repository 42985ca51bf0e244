# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Llama-3.1-8B-Instruct on rows of 131,072 tokens, 2 nodes of 8 H100 (80 GB): TP 4 inside a node, CP 4, DP 1.
#   TRAIN_DATA=train.jsonl sbatch --nodes 2 examples/slurm/finetune.sbatch examples/configs/long-context.sh
#
# plan: 2 × 8 H100, GB a GPU: weights 4.0, gradients 8.0, optimizer 6.0, activations 36.5, logits 1.2, reserve
# 6.0; sum 61.7 of 80. About 52,000 tokens/s (estimate).
# --loss-chunk-size never holds more than 2,048 tokens' worth of logits.
SEQ_LENGTH=${SEQ_LENGTH:-131072}
ROWS=${ROWS:-4}
LR=${LR:-2e-5}
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-meta-llama/Llama-3.1-8B-Instruct}" "${RECIPE[@]}"
    --tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 4
    --loss-chunk-size 2048
)
