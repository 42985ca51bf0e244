"""A checkpoint written on CPU loads whole into the Transformer Engine spec: same torch_dist keys.

Transformer Engine cannot be built here. Its layer spec is Megatron's own, with stand-ins for TE's
modules that have TE's parameters: a linear with a fused norm (`layer_norm_weight`), a norm, a
linear that every rank holds whole.
"""

from pathlib import Path

import pytest
import torch

from megatron_dft.hf.source import open_checkpoint
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks

KINDS = ["llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3"]

ON = {"te": False}  # which layer spec is being built


def stand_in_for_transformer_engine() -> None:
    import megatron.core.models.gpt.gpt_layer_specs as specs
    import megatron.core.transformer.mla_qk_norm_config as latent_norms
    import megatron.core.transformer.multi_latent_attention as latent
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_dft.cpu.layers import Norm

    class LayerNormLinear(ColumnParallelLinear):
        def __init__(self, input_size, output_size, **kwargs):
            super().__init__(input_size, output_size, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

    class WholeLinear(ColumnParallelLinear):
        def __init__(self, *args, parallel_mode=None, tp_group=None, **kwargs):
            super().__init__(*args, **kwargs)

    class Provider(LocalSpecProvider):
        def linear(self):
            return WholeLinear

        def fuse_layernorm_and_linear(self):
            return True

        def column_parallel_layer_norm_linear(self):
            return LayerNormLinear

        def layer_norm(self, rms_norm=False, for_qk=False, has_residual=False):
            return Norm

    specs.TESpecProvider, specs.TENorm, latent.TELinear = Provider, Norm, WholeLinear
    backend = latent_norms.get_backend
    latent_norms.get_backend = lambda impl: Provider() if ON["te"] else backend(impl)


def key_sets(directories: dict[str, Path]) -> dict[str, tuple[dict, dict, dict]]:
    """kind -> keys with global shapes of the CPU layers, of our skeleton, and of the TE spec."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    from megatron_dft.hf import skeleton
    from tests.hf import megatron_model

    def keys(model) -> dict:
        state = model.sharded_state_dict(metadata=skeleton.with_groups(skeleton.CONTENT))
        apply_factories(state)
        tensors = (e for e in nested_values(state) if isinstance(e, ShardedTensor))
        return {t.key: tuple(t.global_shape) for t in tensors}

    def te_spec(config, vp_stage=None):
        ON["te"] = True
        if config.num_moe_experts is None:
            return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        return get_gpt_decoder_block_spec(config.transformer, use_transformer_engine=True)

    megatron_model.start()
    stand_in_for_transformer_engine()
    found = {}
    for kind, directory in directories.items():
        ON["te"] = False
        found[kind] = (
            keys(megatron_model.build(directory)[0]),
            keys(skeleton.build(open_checkpoint(directory))),
            keys(megatron_model.build(directory, spec=te_spec)[0]),
        )
    return found


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    out = tmp_path_factory.mktemp("keys")
    directories = {k: make_tiny(k, out / k) for k in KINDS}
    return run_ranks(key_sets, 1, directories)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_import_writes_the_keys_of_the_transformer_engine_spec(kind, sets):
    _, ours, transformer_engine = sets[kind]
    assert ours == transformer_engine


@pytest.mark.parametrize("kind", KINDS)
def test_cpu_training_writes_the_keys_of_the_transformer_engine_spec(kind, sets):
    on_cpu, _, transformer_engine = sets[kind]
    assert on_cpu == transformer_engine
