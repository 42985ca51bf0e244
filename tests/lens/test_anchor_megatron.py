"""L2-SP inside Megatron's distributed optimizer: every shard is pulled, and all of the model."""

import pytest
import torch

from megatron_dft.lens.anchor import L2SP
from megatron_dft.lens.parameters import inner_optimizers
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks

LR, COEFFICIENT = 0.1, 2.0


def _rank(directory, bf16, tp):
    """Start from `directory`, move every weight, step on zero gradients."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from megatron_dft.hf.load import load_hf_weights
    from megatron_dft.hf.source import open_checkpoint
    from tests.hf import megatron_model

    megatron_model.start(tp=tp)
    precision = dict(bf16=True, params_dtype=torch.bfloat16) if bf16 else {}
    (bare,) = megatron_model.build(directory, **precision)
    load_hf_weights([bare], open_checkpoint(directory))
    wrapped = Float16Module(bare.config, bare) if bf16 else bare
    ddp = DistributedDataParallel(
        bare.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
        ),
        wrapped,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LR,
            weight_decay=0.0,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
            clip_grad=0.0,
        ),
        [ddp],
    )
    start = {n: p.detach().clone() for n, p in bare.named_parameters()}
    anchors = [L2SP(inner, COEFFICIENT) for inner in inner_optimizers(optimizer)]
    with torch.no_grad():
        for p in bare.parameters():
            p += 0.5
    optimizer.reload_model_params()
    for group in optimizer.param_groups:
        group["lr"] = LR
    moved = {n: p.detach().clone() for n, p in bare.named_parameters()}
    ddp.zero_grad_buffer()
    ddp.finish_grad_sync()
    optimizer.step()
    kept = sum(t.numel() for a in anchors for t in a._start.values())
    stepped = {n: p.detach().clone() for n, p in bare.named_parameters()}
    distance = sum(float(a.squared_distance()) for a in anchors)
    return start, moved, stepped, kept, distance


@pytest.mark.parametrize(("bf16", "tp"), [(False, 1), (True, 1), (False, 2)])
def test_the_distributed_optimizer_pulls_every_shard(bf16, tp, tmp_path):
    directory = make_tiny("llama", tmp_path / "m", num_hidden_layers=2, vocab_size=260)
    results = run_ranks(_rank, 2, str(directory), bf16, tp)
    for start, moved, stepped, kept, distance in results:
        total = 0.0
        for name, value in stepped.items():
            gap = moved[name].double() - start[name].double()
            want = moved[name].double() - LR * COEFFICIENT * gap
            tolerance = dict(rtol=2.0**-8, atol=2.0**-8) if bf16 else dict(rtol=1e-6, atol=1e-6)
            assert torch.allclose(value.double(), want, **tolerance), name
            assert not torch.equal(value, moved[name])
            total += float(((want - start[name].double()) ** 2).sum())
        weights = sum(v.numel() for v in start.values())
        if tp == 1:  # the two data-parallel ranks share the starting values
            assert kept < 0.6 * weights
            assert sum(r[3] for r in results) == weights
            assert sum(r[4] for r in results) == pytest.approx(total, rel=2e-2 if bf16 else 1e-5)
        else:
            assert kept == weights and distance == pytest.approx(total, rel=1e-5)


class _Member:
    def __init__(self, **config):
        self.config = type("Config", (), config)()
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_optimizers_that_no_anchor_can_reach():
    chained = type("Chained", (), {"chained_optimizers": [_Member(), _Member()]})()
    assert len(inner_optimizers(chained)) == 2
    for setting in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        with pytest.raises(ValueError, match="--l2sp-coeff: --" + setting.replace("_", "-")):
            inner_optimizers(_Member(**{setting: True}))
