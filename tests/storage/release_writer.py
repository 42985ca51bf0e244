"""Run with PYTHONPATH=TREE of a Megatron-LM release: saves a checkpoint by that release's code.

    python release_writer.py OUT

A bf16 mixture of experts with what training keeps beside it: arguments, random states, a pending
rerun, parameter groups, and extra states as Transformer Engine writes them (bytes, and BytesIO).
"""

import inspect
import io
import os
import pickle
import sys
import warnings


def main(out: str) -> None:
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.training import checkpointing, global_vars

    parallel_state.initialize_model_parallel()
    args = global_vars._GLOBAL_ARGS = _arguments()
    groups = {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "pp_group": parallel_state.get_pipeline_model_parallel_group(),
    }
    taken = inspect.signature(checkpointing.get_rng_state).parameters
    random_state = checkpointing.get_rng_state(
        "torch_dist", **{k: v for k, v in groups.items() if k in taken}
    )
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 3,
        "model": _model() | _extra_states(),
        "rng_state": random_state,
        "rerun_state_machine": _rerun(),
        "opt_param_scheduler": {"max_lr": 1e-4, "lr_decay_style": "cosine", "num_steps": 3},
        "optimizer": _optimizer(),
        "num_floating_point_operations_so_far": 1.5,
    }
    os.makedirs(out)
    dist_checkpointing.save(state, out)


def _arguments():
    import torch
    from megatron.training.arguments import parse_args

    sys.argv = [
        "x", "--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4",
        "--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "1",
        "--train-iters", "1", "--lr", "1e-4", "--bf16", "--num-experts", "4",
        "--exit-signal-handler",
    ]  # fmt: skip
    args = parse_args(ignore_unknown_args=True)
    args.params_dtype, args.iteration = torch.bfloat16, 3
    return args


def _model():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_moe_experts=4,
        use_cpu_initialization=True, moe_router_load_balancing_type="none", add_bias_linear=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
    return GPTModel(config, spec, 128, 32, position_embedding_type="rope").sharded_state_dict()


def _extra_states():
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {"scale_fwd": torch.ones(3), "recipe": None, "extra_fp8_variables": {"a": 1}}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    kept = {
        "bytes": torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8),
        "stream": buffer,
        "empty": torch.empty(0, dtype=torch.uint8),
    }
    return {k: ShardedObject(f"probe.{k}._extra_state", v, (1,), (0,)) for k, v in kept.items()}


def _rerun():
    import torch
    from megatron.core import rerun_state_machine as rerun

    rerun.initialize_rerun_state_machine(mode=rerun.RerunMode.REPORT_DETERMINISM_STATS)
    machine = rerun.get_rerun_state_machine()
    machine.failed_validation_call = rerun.Call(rerun.Caller("loss", 0), 1)
    machine.initial_result = torch.ones(())
    forced = {"force": True} if "force" in inspect.signature(machine.state_dict).parameters else {}
    return machine.state_dict(None, "torch_dist", **forced)


def _optimizer():
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.optimizer import OptimizerConfig

    group = {"lr": 1e-4, "betas": (0.9, 0.95), "params": [0], "step": 3}
    key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.param_state"
    return {
        "param_groups": [group | {"config": OptimizerConfig(lr=1e-4)}],
        "grad_scaler": {"scale": torch.ones(1)},
        "state": ShardedObject(key, {"0": {"exp_avg": torch.zeros(3)}}, (1,), (0,)),
    }


if __name__ == "__main__":
    main(sys.argv[1])
