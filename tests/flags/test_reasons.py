"""What stays refused has a reason in today's Megatron; a release without it turns these red."""

import argparse
import inspect
from types import SimpleNamespace

import pytest
import torch

from megatron_dft.flags import megatron
from megatron_dft.losses import registry

_DFT = registry.get("dft")


def _refused(**given):
    with pytest.raises(ValueError) as error:
        megatron.refuse_settings(argparse.Namespace(**given), _DFT)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["local", "transformer_engine", "full_iteration"])
def test_cuda_graphs_are_refused(kind):
    assert "--cuda-graph-impl" in _refused(cuda_graph_impl=kind)


def _row(*edges):
    from megatron_dft.step.batch import Packing

    boundaries = torch.tensor(edges, dtype=torch.int32)
    return Packing(boundaries, int(boundaries.diff().max())).sequence_params(128)


def test_a_local_graph_replays_one_row_s_numbers():
    """Megatron's own comparison, before a replay, of two packed rows: the graph has the longest
    conversation as a number, and the edges as a tensor of one shape."""
    from megatron.core.transformer.cuda_graphs import ArgMetadata, _CudaGraphRunner

    captured = {"packed_seq_params": ArgMetadata(_row(0, 50, 128))}
    runner = SimpleNamespace(fwd_graph_input_arg_metas=[], fwd_graph_input_kwarg_metas=captured)

    def errors(row):
        return "".join(_CudaGraphRunner.get_mismatch_errors(runner, [], {"packed_seq_params": row}))

    assert "max_seqlen_q: 90 vs 78" in errors(_row(0, 90, 128))
    assert "cu_seqlens_q: Received shape torch.Size([4])" in errors(_row(0, 50, 100, 128))
    assert errors(_row(0, 78, 128)) == ""


def test_transformer_engine_s_graph_takes_no_packed_row():
    from megatron.core.transformer.transformer_layer import TransformerLayer

    layer = SimpleNamespace(config=SimpleNamespace(cuda_graph_modules=[]))
    with pytest.raises(AssertionError, match="packed_seq_params are excluded"):
        TransformerLayer._te_cuda_graph_replay(layer, packed_seq_params=_row(0, 50, 128))


def test_a_graph_of_the_whole_iteration_looks_for_no_nan():
    """It would go on training on one: the check of each loss is the host's."""
    from megatron.training import arguments

    assert "--no-check-for-nan-in-loss-and-grad should be set" in inspect.getsource(arguments)


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
