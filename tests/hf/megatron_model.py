"""Build Megatron models for the tests of the Hugging Face conversion: on gloo ranks, on CPU."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dft.hf.config import apply_to_model_config, megatron_args
from megatron_dft.hf.source import open_checkpoint

# argparse destinations whose TransformerConfig field has another name
_RENAMED = {"num_experts": "num_moe_experts", "swiglu": "gated_linear_unit"}


def cpu_layers(config: Any, vp_stage: int | None = None) -> Any:
    from megatron.training.models.gpt import default_layer_spec

    from megatron_dft.hf.keys import with_te_keys

    return with_te_keys(default_layer_spec(config, vp_stage), config)


_YARN_DEFAULTS = dict(multi_latent_attention=False, mscale=1.0, mscale_all_dim=0.0)


def start(tp: int = 1, pp: int = 1, vpp: int | None = None, **others: int) -> None:
    """Bring up the CPU runtime and Megatron's process groups (`others`: expert_* sizes)."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_dft.cpu.runtime import activate

    if parallel_state.model_parallel_is_initialized():
        return
    activate()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **others,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(
    directory: str | Path,
    *,
    vpp: int | None = None,
    pad_to: int = 1,
    spec: Any = None,
    **config: Any,
) -> list:
    """This rank's GPTModel chunks for the checkpoint in `directory`; every parameter starts as NaN.

    `pad_to` is --make-vocab-size-divisible-by, `spec` a layer spec (default: the CPU layers'),
    `config` overrides TransformerConfig fields.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.training.argument_utils import _apply_yarn_config_from_args
    from megatron.training.models.gpt import GPTModelConfig

    checkpoint = open_checkpoint(directory)
    a = megatron_args(checkpoint)
    config_class = MLATransformerConfig if a.get("multi_latent_attention") else TransformerConfig
    fields = config_class.__dataclass_fields__
    settings = {_RENAMED.get(k, k): v for k, v in a.items()}
    settings = {k: v for k, v in settings.items() if k in fields}
    settings |= dict(
        activation_func=torch.nn.functional.silu,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        transformer_impl="local",
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=mpu.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=mpu.get_expert_tensor_parallel_world_size(),
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    transformer = config_class(**(settings | config))
    _apply_yarn_config_from_args(transformer, Namespace(**(_YARN_DEFAULTS | a)))
    model_config = GPTModelConfig(
        transformer=transformer,
        transformer_layer_spec=spec or cpu_layers,
        vocab_size=a["vocab_size"],
        make_vocab_size_divisible_by=pad_to,
        should_pad_vocab=True,
        seq_length=a["max_position_embeddings"],
        position_embedding_type=a["position_embedding_type"],
        rotary_base=a["rotary_base"],
        rotary_percent=a["rotary_percent"],
        rope_scaling=a.get("use_rope_scaling", False),
        seq_len_interpolation_factor=a.get("rotary_seq_len_interpolation_factor"),
        share_embeddings_and_output_weights=not a["untie_embeddings_and_output_weights"],
    )
    apply_to_model_config(model_config, checkpoint)
    builder = model_config.get_builder_cls()(model_config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models = [builder.build_model(groups, vp_stage=i if vpp else None) for i in range(vpp or 1)]
    for model in models:
        model.eval()  # Megatron trains experts under tensor parallelism only with sequence parallel
        for p in model.parameters():
            p.data.fill_(float("nan"))
    return models


def logits(models: list, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [b, s, V/tp] of this rank on the last pipeline stage, None elsewhere.

    tokens [b, s]. Plain sends from stage to stage, chunk by chunk: no schedule.
    """
    from megatron.core import parallel_state as mpu

    pp, stage = (
        mpu.get_pipeline_model_parallel_world_size(),
        mpu.get_pipeline_model_parallel_rank(),
    )
    ranks = dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())
    b, s = tokens.shape
    positions = torch.arange(s).expand(b, s)
    output = None
    for chunk, model in enumerate(models):
        if not (stage == 0 and chunk == 0):
            if pp > 1:
                output = torch.empty(s, b, model.config.hidden_size)
                dist.recv(output, ranks[(stage - 1) % pp])
            model.set_input_tensor(output)
        with torch.no_grad():
            output = model(tokens, positions, None)
        if pp > 1 and not (stage == pp - 1 and chunk == len(models) - 1):
            dist.send(output.contiguous(), ranks[(stage + 1) % pp])
    return output if stage == pp - 1 else None
