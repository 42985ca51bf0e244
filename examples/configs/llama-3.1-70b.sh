# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Llama-3.1-70B on 8 nodes or more of 8 H100 (80 GB): TP 8 inside a node, PP 4 over nodes, DP 2 or more.
#   TRAIN_DATA=train.jsonl sbatch --nodes 8 examples/slurm/finetune.sbatch examples/configs/llama-3.1-70b.sh
#
# The base model has no chat template: name one by --chat-template.
# GB a GPU on 8 nodes, 70.6 B / (TP 8 × PP 4) = 2.21 B parameters, 2.34 B on the stages with an embedding:
# weights and gradients 6 × 2.34 = 14.0; master weights and Adam 12 × 2.34 / 2 = 14.0; activations of the
# first stage, which holds 4 micro-batches at once, 4 × 34 × 4096 × 8192 × 20 layers / 8 = 11.4; logits
# 4096 × 128,256 / 8 × 10 bytes = 0.7. Sum 40.
# Bubble (PP − 1) / micro-batches: with 32 rows over DP 2, 3 / 16 = 19 %; more rows make it smaller.
LR=${LR:-2e-5}
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-meta-llama/Llama-3.1-70B}" "${RECIPE[@]}"
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --sequence-parallel
)
