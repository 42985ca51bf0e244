"""What stays refused has a reason in today's Megatron; a release without it turns these red."""

import argparse
import inspect

import pytest

from megatron_dft.flags import megatron
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
