# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Qwen3-30B-A3B (128 experts) on 2 nodes of 8 H100 (80 GB): EP 8 inside a node, DP 16, experts twice.
#   TRAIN_DATA=train.jsonl sbatch --nodes 2 examples/slurm/finetune.sbatch examples/configs/qwen3-30b-a3b.sh
#
# GB a GPU, 1.54 B parameters outside the experts and 29.0 B / EP 8 = 3.62 B in them: weights and gradients
# 6 × (1.54 + 3.62) = 31.0; master weights and Adam 12 × 1.54 / 16 + 12 × 3.62 / 2 = 22.9; logits 4096 ×
# 151,936 × 10 bytes = 6.2; activations are recomputed for each layer, under 5. Sum 65. On 1 node the experts'
# Adam alone would take 12 × 3.62 = 43, and the sum passes 80.
# DFT shrinks the main gradient, so the router's load-balancing loss weighs relatively more.
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-Qwen/Qwen3-30B-A3B}" "${RECIPE[@]}"
    --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall --moe-grouped-gemm
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
)
