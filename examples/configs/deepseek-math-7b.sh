# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# DeepSeekMath-7B-Base on 1 or 2 nodes of 8 H100 (80 GB): TP 2 inside a node, DP 4 a node.
#   TRAIN_DATA=train.jsonl sbatch --nodes 1 examples/slurm/finetune.sbatch examples/configs/deepseek-math-7b.sh
#
# The base model has no chat template: name one by --chat-template. It is published as pytorch_model.bin;
# MODEL names a directory with the same weights as safetensors.
# GB a GPU on 1 node, 6.91 B / TP 2 = 3.46 B parameters: weights and gradients 6 × 3.46 = 20.7; master weights
# and Adam 12 × 3.46 / 4 = 10.4; activations 34 × 4096 × 4096 × 30 layers / 2 = 8.6 with sequence parallelism;
# logits 4096 × 102,400 / 2 × 10 bytes = 2.1. Sum 42.
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-deepseek-ai/deepseek-math-7b-base}" "${RECIPE[@]}"
    --tensor-model-parallel-size 2 --sequence-parallel
)
