"""What stays refused has a reason in today's Megatron; a release without it turns these red."""

import argparse
import inspect

import pytest

from megatron_dft.flags import megatron, route
from megatron_dft.losses import registry

_DFT = registry.get("dft")


def _refused(**given):
    with pytest.raises(ValueError) as error:
        megatron.refuse_settings(argparse.Namespace(**given), _DFT)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["local", "transformer_engine", "full_iteration"])
def test_cuda_graphs(kind):
    """Transformer Engine's graphs take tensors alone: no packed row goes in."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    assert "--cuda-graph-impl" in _refused(cuda_graph_impl=kind)
    replay = inspect.getsource(TransformerLayer._te_cuda_graph_replay)
    assert "packed_seq_params are excluded from input list" in replay


def test_megatron_fsdp():
    """Its checkpoints have a format of their own, and its device mesh is CUDA's."""
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.training import checkpointing

    assert "torch_dist" in _refused(use_megatron_fsdp=True)
    loading = inspect.getsource(checkpointing)
    assert (
        "if getattr(args, 'use_megatron_fsdp', False):\n            ckpt_format = 'fsdp_dtensor'"
        in loading
    )
    assert 'device_type="cuda"' in inspect.getsource(mcore_fsdp_adapter)


def test_quantised_parameters():
    """Their fp32 masters are those of the initialisation, ahead of Hugging Face's weights."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    assert "get_high_precision_init_val" in _refused(fp8_param_gather=True)
    source = inspect.getsource(DistributedOptimizer)
    assert "model_param.get_high_precision_init_val()" in source


@pytest.mark.parametrize("dest", ["fp8_output_proj", "defer_embedding_wgrad_compute"])
def test_output_layers_of_another_kind(dest):
    assert "--" + dest.replace("_", "-") in _refused(**{dest: True})


def test_heads_of_mtp_beside_the_chunked_one_under_fusion():
    """One call of the layer marks the weight as added, and DDP drops what autograd returns."""
    from megatron.core.distributed import distributed_data_parallel
    from megatron.core.tensor_parallel import layers

    given = dict(
        loss_chunk_size=16, loss_route=None, loss_memory=1024.0, loss_row_filter=None,
        cross_entropy="auto", mtp_num_layers=1, gradient_accumulation_fusion=True, kl_coeff=0.0,
        cross_entropy_loss_fusion=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="--no-gradient-accumulation-fusion"):
        route.check(argparse.Namespace(**given), _DFT, None)
    given["gradient_accumulation_fusion"] = False
    route.check(argparse.Namespace(**given), _DFT, None)
    assert "weight.grad_added_to_main_grad = True" in inspect.getsource(layers)
    assert "not param.grad_added_to_main_grad" in inspect.getsource(distributed_data_parallel)
