"""What this package knows of Megatron's releases, and everything of others that it replaces.

`WRAPPED` lists every function or object of Megatron and torch that a run replaces (the CPU runtime
has a table of its own, cpu/runtime.py): "module:name" or "module:Class.name" → why. hooks.py
replaces nothing else. `PROVIDED` lists the modules of others that are absent and stood in for.
"""

_TRAINING = "megatron.training.training"
_CHECKPOINTING = "megatron.training.checkpointing"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_ROUTER = "megatron.core.transformer.moe.router"
_UNSHARDED = "megatron.core.optimizer.optimizer"
_TORCH = "torch.distributed.checkpoint"
_RERUN = "megatron.core.rerun_state_machine:RerunStateMachine"
# Every name by which torch makes a store: torchrun's two rendezvous and the workers' own.
STORES = (
    "torch.distributed:TCPStore",
    "torch.distributed.rendezvous:TCPStore",
    "torch.distributed.elastic.rendezvous.static_tcp_rendezvous:TCPStore",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend:TCPStore",
)

WRAPPED: dict[str, str] = {
    # the loop
    f"{_TRAINING}:training_log": "progress lines and figures of ours ahead of Megatron's log",
    f"{_TRAINING}:evaluate_and_print_results": "no second evaluation after the same step",
    f"{_TRAINING}:evaluate": "figures that have no perplexity are logged here",
    f"{_TRAINING}:post_training_step_callbacks": "exports and the lens after a step",
    f"{_TRAINING}:get_megatron_optimizer": "the L2-SP anchor takes the optimizer's weights",
    f"{_TRAINING}:setup_model_and_optimizer": "the checkpoint is chosen before the model is built",
    f"{_TRAINING}:load_checkpoint": "a step that fails to load gives way to the one before",
    f"{_TRAINING}:build_pretraining_data_loader": "a finished run has no row left to load",
    f"{_TRAINING}:checkpoint_and_decide_exit": "a save and a step are progress to the watchdog",
    f"{_TRAINING}:save_checkpoint_and_time": "--keep-last deletes after a save",
    "megatron.core.models.gpt.gpt_model:process_mtp_loss": "MTP heads have a loss of their own",
    "megatron.core.datasets.utils:compile_helpers": "the wheel has no Makefile; make's failure "
    "would end the job",
    "megatron.core.tensor_parallel.layers:_grad_accum_fusion_available": "gradient accumulation "
    "fusion works without apex",
    "megatron.core.models.gpt.gpt_layer_specs:LNImpl": "apex's norm knows no RMSNorm",
    "megatron.core.transformer.transformer_block:LayerNormImpl": "apex's norm knows no RMSNorm",
    # mixture of experts
    f"{_ROUTER}:TopKRouter.attach_and_log_load_balancing_loss": "the auxiliary losses' factor is "
    "of supervised tokens",
    f"{_ROUTER}:TopKRouter.apply_z_loss": "the z loss's factor is of supervised tokens",
    f"{_ROUTER}:z_loss_func": "the z loss's factor acts on its gradient alone",
    # stopping and numbers
    "megatron.training.global_vars:_GLOBAL_SIGNAL_HANDLER": "SIGTERM, SIGUSR1 and a stop file stop "
    "all ranks after the same step",
    f"{_RERUN}.validate_result": "a NaN stops all ranks after the step, with the rows named",
    f"{_RERUN}.should_checkpoint_and_exit": "the ranks agree on a bad number once a step",
    # checkpoints
    f"{_CHECKPOINTING}:check_checkpoint_args": "targets of the lens go on where they stopped",
    f"{_CHECKPOINTING}:_load_base_checkpoint": "groups of another learning rate are found",
    f"{_CHECKPOINTING}:sys": "a checkpoint that fails to load exits with a status that is not 0",
    f"{_CHECKPOINTING}:maybe_msc": "the tracker file is replaced and never truncated",
    "megatron.core.dist_checkpointing:save": "a clean directory before, the manifest after",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue": "no "
    "helper process a rank where saving is not asynchronous",
    f"{_OPTIMIZER}.state_dict": "torch's Adam has counted no step when it is resumed",
    f"{_OPTIMIZER}.load_state_dict": "torch's Adam resumes with its true count",
    f"{_UNSHARDED}:FP32Optimizer.load_state_dict": "torch's Adam goes on from FusedAdam's "
    "checkpoint, and FusedAdam from torch's",
    f"{_UNSHARDED}:Float16OptimizerWithFloat16Params.load_state_dict": "torch's Adam goes on from "
    "FusedAdam's checkpoint, and FusedAdam from torch's",
    f"{_OPTIMIZER}._set_main_param_and_optimizer_states": "the count is no tensor to copy",
    # one node
    **dict.fromkeys(STORES, "a store of one node listens on the loopback interface alone"),
    # a checkpoint's pickles
    "torch:load": "weights_only, with Megatron's classes: nothing that a file names is run",
    f"{_TORCH}.filesystem:FileSystemReader.read_metadata": "the table is built of listed classes",
    f"{_TORCH}.default_planner:DefaultLoadPlanner.load_bytes": "a refused byte entry is named",
    "megatron.core.dist_checkpointing.core:maybe_load_config": "a bad metadata.json is one line",
    "megatron.core.dist_checkpointing:load_common_state_dict": "a refused common state is one line",
    "megatron.core.dist_checkpointing:load": "all ranks refuse what one of them refuses",
    f"{_CHECKPOINTING}:_get_checkpoint_format": "--load takes torch_dist alone",
    # conversion
    "torch.cuda:current_device": "a skeleton's rotary tables need no GPU",
}

PROVIDED: dict[str, str] = {
    "fused_weight_gradient_mlp_cuda": "apex's extension, which transformer-engine does not bring "
    "and Megatron's output layer asks for",
}
