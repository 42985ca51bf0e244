# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Llama-3.1-70B on 8 nodes or more of 8 H100 (80 GB): TP 8 inside a node, PP 4 over nodes, DP 2 or more.
#   TRAIN_DATA=train.jsonl sbatch --nodes 8 examples/slurm/finetune.sbatch examples/configs/llama-3.1-70b.sh
#
# The base model has no chat template: templates/llama-3.jinja is given, CHAT_TEMPLATE names another.
# plan: 8 × 8 H100, GB a GPU: weights 4.5, gradients 9.1, optimizer 13.6, activations 11.2, reserve 6.0; sum
# 44.4 of 80. Pipeline bubble 16%. About 38,000 tokens/s (estimate).
# More rows make the bubble smaller.
LR=${LR:-2e-5}
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-meta-llama/Llama-3.1-70B}" "${RECIPE[@]}"
    --chat-template "${CHAT_TEMPLATE:-$configs/templates/llama-3.jinja}"
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --sequence-parallel
)
