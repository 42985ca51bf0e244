# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Qwen2.5-Math-1.5B on 1 node of 8 H100 (80 GB): TP 1, DP 8.
#   TRAIN_DATA=train.jsonl sbatch --nodes 1 examples/slurm/finetune.sbatch examples/configs/qwen2.5-math-1.5b.sh
#
# GB a GPU, 1.54 B parameters: weights bf16 and gradients fp32 6 × 1.54 = 9.3; master weights and Adam
# 12 × 1.54 / 8 = 2.3; activations 34 × 4096 × 1536 × 28 layers = 6.0; logits of 4,096 tokens × 151,936, 10
# bytes each through the cross entropy, 6.2. Sum 24: no model parallelism needed, so none is paid for.
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(--hf-model "${MODEL:-Qwen/Qwen2.5-Math-1.5B}" "${RECIPE[@]}")
