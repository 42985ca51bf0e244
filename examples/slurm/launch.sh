# shellcheck shell=bash disable=SC2154,SC2034
# How finetune.sbatch starts the ranks: `launch`, what runs on a node; `srun`, what starts it there, in the
# container where there is one; `per_node` and `tasks`, how many of a step. Sourced; reads and sets its variables.

# On the loopback interface: nothing of a job of one node listens to the network.
if [ "$nodes" = 1 ]; then first=127.0.0.1; fi
bind=()
if [ "$numa" = 1 ] && [ "$launcher" = torchrun ]; then bind=(--numa-binding node); fi
if [ "$launcher" = srun ]; then
    launch=("$python")
elif [ "$nodes" = 1 ]; then
    launch=("$python" -m megatron_dft.compat.loopback --nproc-per-node "$procs" --max-restarts 0 "${bind[@]}")
else
    launch=(
        "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$procs" "${bind[@]}"
        --node-rank NODE_RANK --master-addr "$first" --master-port "$port" --max-restarts 0
    )
fi
# On every node: a task each, with LAUNCHER=srun a task a rank.
srun=(srun --nodes "$nodes" --label --kill-on-bad-exit=1 --wait=60)
if [ -n "$image" ]; then
    # The container's home is not this one: what is kept there is named.
    export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
    export MEGATRON_DFT_DATA_CACHE=${MEGATRON_DFT_DATA_CACHE:-$HOME/.cache/megatron_dft/data}
    [ "$dry_run" = 1 ] || mkdir -p "$RUN_DIR" "$HF_HOME" "$MEGATRON_DFT_DATA_CACHE" || die "$RUN_DIR cannot be made"
    mounted=$(mounts "$home" "$RUN_DIR" "$(dirname "$config")" "${TRAIN_DATA:-}" "${VALID_DATA:-}" "${MODEL:-}" \
        "${CHAT_TEMPLATE:-}" "$HF_HOME" "$MEGATRON_DFT_DATA_CACHE") || exit
    srun+=(
        --container-image "$image" --no-container-mount-home --container-workdir "$home"
        --container-mounts "$mounted${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    )
fi
per_node=(--ntasks "$nodes" --ntasks-per-node 1)
tasks=("${per_node[@]}")
if [ "$launcher" = srun ]; then
    # Slurm would give each task one core.
    cpus=$((${SLURM_CPUS_ON_NODE:-$procs} / procs))
    tasks=(
        --ntasks $((nodes * procs)) --ntasks-per-node "$procs" --cpus-per-task $((cpus > 0 ? cpus : 1)) --cpu-bind none
    )
fi
