"""The CPU norm and attention against formulas in float64, alone and under context parallelism."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

N, G, D = 4, 2, 8


def _config(**given):
    values = dict(
        attention_dropout=0.0,
        window_size=None,
        window_attn_skip_freq=None,
        apply_query_key_layer_scaling=False,
        num_attention_heads=N,
        softmax_type="vanilla",
        params_dtype=torch.float64,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=False,
        sequence_parallel=False,
    )
    return SimpleNamespace(**(values | given))


def _attention(softcap=None, **given):
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_dft.cpu.layers import Attention

    one = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    groups = SimpleNamespace(tp=one, cp=dist.group.WORLD)
    return Attention(_config(**given), 1, AttnMaskType.causal, "self", logit_softcap=softcap,
                     pg_collection=groups)  # fmt: skip


def _reference(q, k, v, edges, window=None, sink=None, softcap=None):
    """Causal attention inside each conversation, one query at a time: [s, b, n, d]."""
    out = torch.zeros_like(q)
    for start, end in zip(edges, edges[1:], strict=False):
        for i in range(start, end):
            first = start if window is None else max(start, i - window)
            keys = k[first : i + 1].repeat_interleave(N // G, 2)
            values = v[first : i + 1].repeat_interleave(N // G, 2)
            scores = torch.einsum("bnd,sbnd->sbn", q[i], keys) / D**0.5
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            if sink is not None:
                scores = torch.cat([scores, sink.expand(1, *scores.shape[1:])])
            weights = scores.softmax(0)[: len(keys)]
            out[i] = torch.einsum("sbn,sbnd->bnd", weights, values)
    return out.flatten(-2)


def _inputs(length, batch):
    draw = torch.Generator().manual_seed(3)
    shapes = [(length, batch, n, D) for n in (N, G, G)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


def _case(edges, packed, window, sink, softcap=None):
    """(error of the output, error of the gradients) on this context-parallel rank."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_dft.compat.context_parallel import token_indices

    length, batch = edges[-1], 1 if packed else 2
    layer = _attention(
        softcap,
        window_size=None if window is None else (window, 0),
        softmax_type="learnable" if sink else "vanilla",
    )
    sink_logits = None
    if sink:
        torch.nn.init.normal_(layer.softmax_offset)
        dist.broadcast(layer.softmax_offset.data, 0)
        sink_logits = layer.softmax_offset.detach()
    boundaries = torch.tensor(edges, dtype=torch.int32) if packed else None
    held = token_indices(
        length, dist.get_world_size(), dist.get_rank(), boundaries, torch.device("cpu")
    )
    whole = _inputs(length, batch)
    upstream = torch.randn(length, batch, N * D, dtype=torch.float64,
                           generator=torch.Generator().manual_seed(4))  # fmt: skip
    expected = _reference(*whole, edges if packed else [0, length], window, sink_logits,
                          softcap)  # fmt: skip
    (expected * upstream).sum().backward()

    mine = [x.detach()[held].requires_grad_() for x in whole]
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_q_padded=boundaries
    ) if packed else None  # fmt: skip
    given = [x.squeeze(1) for x in mine] if packed else mine
    got = layer(*given, packed_seq_params=params)
    got = got.unsqueeze(1) if packed else got
    (got * upstream[held]).sum().backward()
    error = (got - expected[held]).abs().max().item()
    gradients = [
        (a.grad - b.grad[held]).abs().max().item() for a, b in zip(mine, whole, strict=True)
    ]
    return error, max(gradients)


CASES = {
    "plain": ([0, 16], False, None, False),
    "window": ([0, 16], False, 3, False),
    "packed": ([0, 4, 12, 16], True, None, False),
    "packed window": ([0, 4, 12, 16], True, 3, False),
    "sinks": ([0, 16], False, None, True),
    "packed sinks": ([0, 8, 16], True, None, True),
    "soft cap": ([0, 16], False, None, False, 0.5),
    "packed window soft cap and sinks": ([0, 4, 12, 16], True, 3, True, 0.5),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_formula(case, ranks):
    for error, gradients in run_ranks(_case, ranks, *CASES[case]):
        assert error <= 1e-12 and gradients <= 1e-12


def _unpadded():
    return _case([0, 3, 16], True, None, False)


def test_a_conversation_that_does_not_divide_among_context_ranks_is_refused():
    with pytest.raises(ValueError, match="--context-parallel-size 2"):
        run_ranks(_unpadded, 2)


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms(kind, zero_centred):
    from megatron_dft.cpu.layers import Norm

    config = _config(
        normalization=kind, layernorm_zero_centered_gamma=zero_centred, sequence_parallel=True,
        params_dtype=torch.float32,
    )  # fmt: skip
    norm = Norm(config, 12, eps=1e-5)
    x = torch.randn(5, 2, 12, dtype=torch.float32)
    fresh = norm(x)
    torch.nn.init.normal_(norm.weight)
    wide, weight = x.double(), norm.weight.detach().double() + zero_centred
    if kind == "LayerNorm":
        wide = wide - wide.mean(-1, keepdim=True)
    unit = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(fresh.double(), unit, atol=1e-6)
    assert torch.allclose(norm(x).double(), unit * weight, atol=1e-5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert all(p.sequence_parallel for p in norm.parameters())


def test_other_norms_are_refused():
    from megatron_dft.cpu.layers import Norm

    with pytest.raises(ValueError, match="--normalization L2Norm"):
        Norm(_config(normalization="L2Norm"), 4)
