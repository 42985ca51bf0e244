# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Llama-3.1-8B on 1 or 2 nodes of 8 H100 (80 GB): TP 2 inside a node, DP 4 a node. The paper's lr here is 2e-5.
#   TRAIN_DATA=train.jsonl sbatch --nodes 1 examples/slurm/finetune.sbatch examples/configs/llama-3.1-8b.sh
#
# The base model has no chat template: templates/llama-3.jinja is given, CHAT_TEMPLATE names another.
# plan: 1 × 8 H100, GB a GPU: weights 8.0, gradients 16.1, optimizer 12.0, activations 9.1, logits 2.6,
# reserve 6.0; sum 53.8 of 80. About 61,000 tokens/s (estimate).
LR=${LR:-2e-5}
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-meta-llama/Llama-3.1-8B}" "${RECIPE[@]}"
    --chat-template "${CHAT_TEMPLATE:-$configs/templates/llama-3.jinja}"
    --tensor-model-parallel-size 2 --sequence-parallel
)
