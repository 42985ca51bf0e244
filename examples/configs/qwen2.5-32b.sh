# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Qwen2.5-32B on 4 nodes of 8 H100 (80 GB): TP 8 inside each node, DP 4 over the nodes.
#   TRAIN_DATA=train.jsonl sbatch --nodes 4 examples/slurm/finetune.sbatch examples/configs/qwen2.5-32b.sh
#
# GB a GPU, 32.8 B / TP 8 = 4.10 B parameters: weights and gradients 6 × 4.10 = 24.6; master weights and Adam
# 12 × 4.10 / 4 = 12.3; activations 34 × 4096 × 5120 × 64 layers / 8 = 5.7 with sequence parallelism; logits
# 4096 × 152,064 / 8 × 10 bytes = 0.8. Sum 43. TP 4 × PP 2 fits too, but pays a pipeline bubble.
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-Qwen/Qwen2.5-32B}" "${RECIPE[@]}"
    --tensor-model-parallel-size 8 --sequence-parallel
)
