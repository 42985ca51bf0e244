# shellcheck shell=bash disable=SC2034 # read by the script that sources it
# Llama-3.1-8B-Instruct on rows of 131,072 tokens, 2 nodes of 8 H100 (80 GB): TP 4 inside a node, CP 4, DP 1.
#   TRAIN_DATA=train.jsonl sbatch --nodes 2 examples/slurm/finetune.sbatch examples/configs/long-context.sh
#
# GB a GPU, 8.03 B / TP 4 = 2.01 B parameters: weights and gradients 6 × 2.01 = 12.0; master weights and Adam
# 12 × 2.01 / (DP × CP = 4) = 6.0; activations 34 × (131,072 / CP 4) × 4096 × 32 layers / TP 4 = 36.5. The logits
# of 32,768 tokens × 128,256 / 4 would take 10.5: --loss-chunk-size never holds more than 2,048 tokens' worth.
# Sum 55.
SEQ_LENGTH=${SEQ_LENGTH:-131072}
ROWS=${ROWS:-4}
LR=${LR:-2e-5}
# shellcheck source=examples/configs/recipe.sh
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
TRAIN_ARGS=(
    --hf-model "${MODEL:-meta-llama/Llama-3.1-8B-Instruct}" "${RECIPE[@]}"
    --tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 4
    --loss-chunk-size 2048
)
