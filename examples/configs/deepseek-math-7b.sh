# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# DeepSeekMath-7B-Base on 1 or 2 nodes of 8 H100 (80 GB): TP 2 inside a node, DP 4 a node.
#   TRAIN_DATA=train.jsonl sbatch --nodes 1 examples/slurm/finetune.sbatch examples/configs/deepseek-math-7b.sh
#
# The base model has no chat template: templates/deepseek-math.jinja is given, CHAT_TEMPLATE names another.
# It is published as pytorch_model.bin; MODEL names a directory with the same weights as safetensors.
# plan: 1 × 8 H100, GB a GPU: weights 6.9, gradients 13.8, optimizer 10.4, activations 8.1, logits 2.1,
# reserve 6.0; sum 47.3 of 80. About 69,000 tokens/s (estimate).
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-deepseek-ai/deepseek-math-7b-base}" "${RECIPE[@]}"
    --chat-template "${CHAT_TEMPLATE:-$configs/templates/deepseek-math.jinja}"
    --tensor-model-parallel-size 2 --sequence-parallel
)
