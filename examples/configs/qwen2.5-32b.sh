# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Qwen2.5-32B on 4 nodes of 8 H100 (80 GB): TP 8 inside each node, DP 4 over the nodes.
#   TRAIN_DATA=train.jsonl sbatch --nodes 4 examples/slurm/finetune.sbatch examples/configs/qwen2.5-32b.sh
#
# plan: 4 × 8 H100, GB a GPU: weights 8.2, gradients 16.4, optimizer 12.3, activations 7.6, logits 0.8,
# reserve 6.0; sum 51.3 of 80. About 38,000 tokens/s (estimate).
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-Qwen/Qwen2.5-32B}" "${RECIPE[@]}"
    --tensor-model-parallel-size 8 --sequence-parallel
)
