# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Qwen2.5-Math-7B on 1 or 2 nodes of 8 H100 (80 GB): TP 2 inside a node, DP 4 a node.
#   TRAIN_DATA=train.jsonl sbatch --nodes 2 examples/slurm/finetune.sbatch examples/configs/qwen2.5-math-7b.sh
#
# GB a GPU on 1 node, 7.62 B / TP 2 = 3.81 B parameters: weights and gradients 6 × 3.81 = 22.9; master weights
# and Adam 12 × 3.81 / 4 = 11.4; activations 34 × 4096 × 3584 × 28 layers / 2 = 7.0 with sequence parallelism;
# logits 4096 × 152,064 / 2 × 10 bytes = 3.1. Sum 44. TP 1 would need 6 × 7.62 + 12 × 7.62 / 8 + 14 + 6.2 = 77.
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-Qwen/Qwen2.5-Math-7B}" "${RECIPE[@]}"
    --tensor-model-parallel-size 2 --sequence-parallel
)
