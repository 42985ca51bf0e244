# shellcheck shell=bash
# Environment of every rank, each variable with its reason; a value set before sbatch wins.

# Megatron overlaps tensor-parallel communication by launch order: one hardware queue keeps it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Rows of changing length fragment the allocator; growing segments instead of new ones avoid it.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Communication kernels keep their buffers only while they run, instead of until the next sync.
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}
# Warnings alone: they name the failing interface or the version mismatch; INFO is a flood.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The last collectives of each rank are kept, and shown when one of them times out.
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
# A thread pool in each of 8 ranks would fight over the same cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Output reaches the log when it is printed, also that of a rank that is killed a moment later.
export PYTHONUNBUFFERED=1
# Tokenizers would warn in every forked worker.
export TOKENIZERS_PARALLELISM=false
# Compute nodes often have no way out; `wandb sync` uploads later.
export WANDB_MODE=${WANDB_MODE:-offline}
# Which network interface to use is the site's: set NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_HCA
# in the configuration where the first one found is the wrong one. None is set here.
