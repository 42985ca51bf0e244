# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Qwen2.5-Math-1.5B on 1 node of 8 H100 (80 GB): TP 1, DP 8.
#   TRAIN_DATA=train.jsonl sbatch --nodes 1 examples/slurm/finetune.sbatch examples/configs/qwen2.5-math-1.5b.sh
#
# plan: 1 × 8 H100, GB a GPU: weights 3.1, gradients 6.2, optimizer 2.3, activations 8.4, logits 6.2, reserve
# 6.0; sum 32.2 of 80. About 210,000 tokens/s (estimate).
# No model parallelism is needed, so none is paid for.
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(--hf-model "${MODEL:-Qwen/Qwen2.5-Math-1.5B}" "${RECIPE[@]}")
