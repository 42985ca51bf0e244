# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Qwen3-30B-A3B (128 experts) on 2 nodes of 8 H100 (80 GB): EP 8 inside a node, DP 16, experts twice.
#   TRAIN_DATA=train.jsonl sbatch --nodes 2 examples/slurm/finetune.sbatch examples/configs/qwen3-30b-a3b.sh
#
# plan: 2 × 8 H100, GB a GPU: weights 10.3, gradients 20.7, optimizer 22.9, activations 1.4, logits 6.2,
# reserve 6.0; sum 67.5 of 80. About 94,000 tokens/s (estimate).
# Activations are recomputed for each layer. On 1 node the experts' Adam would not fit beside the rest.
# DFT shrinks the main gradient, so the router's load-balancing loss weighs relatively more.
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-Qwen/Qwen3-30B-A3B}" "${RECIPE[@]}"
    --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall --moe-grouped-gemm
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
)
