# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Qwen2.5-Math-7B on 1 or 2 nodes of 8 H100 (80 GB): TP 2 inside a node, DP 4 a node.
#   TRAIN_DATA=train.jsonl sbatch --nodes 2 examples/slurm/finetune.sbatch examples/configs/qwen2.5-math-7b.sh
#
# plan: 2 × 8 H100, GB a GPU: weights 7.6, gradients 15.2, optimizer 5.7, activations 9.1, logits 3.1, reserve
# 6.0; sum 46.7 of 80. About 98,000 tokens/s (estimate).
# TP 1 does not fit on 1 node.
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-Qwen/Qwen2.5-Math-7B}" "${RECIPE[@]}"
    --tensor-model-parallel-size 2 --sequence-parallel
)
