# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Llama-3.1-8B on 1 or 2 nodes of 8 H100 (80 GB): TP 2 inside a node, DP 4 a node. The paper's lr here is 2e-5.
#   TRAIN_DATA=train.jsonl sbatch --nodes 1 examples/slurm/finetune.sbatch examples/configs/llama-3.1-8b.sh
#
# The base model has no chat template: name one by --chat-template.
# GB a GPU on 1 node, 8.03 B / TP 2 = 4.02 B parameters: weights and gradients 6 × 4.02 = 24.1; master weights
# and Adam 12 × 4.02 / 4 = 12.1; activations 34 × 4096 × 4096 × 32 layers / 2 = 9.1 with sequence parallelism;
# logits 4096 × 128,256 / 2 × 10 bytes = 2.6. Sum 48.
LR=${LR:-2e-5}
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-meta-llama/Llama-3.1-8B}" "${RECIPE[@]}"
    --tensor-model-parallel-size 2 --sequence-parallel
)
