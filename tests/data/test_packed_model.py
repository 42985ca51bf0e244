"""A conversation's loss and DFT gradient do not depend on what shares its row, nor on CP."""

import pytest
import torch

from tests.data.fixtures import chat, write_jsonl
from tests.hf import megatron_model
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks

SEQ_LENGTH = 128


def _forward(model, row, cp):
    """Per-token cross entropy [S / cp] of this rank, its loss mask and its global positions."""
    from megatron.core import parallel_state as mpu
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_dft.compat.context_parallel import token_indices

    packed, borders = None, row.get("cu_seqlens")
    if borders is not None:
        borders = torch.unique_consecutive(borders)
        longest = int(row["max_seqlen"])
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders,
            cu_seqlens_q_padded=borders, cu_seqlens_kv_padded=borders,
            max_seqlen_q=longest, max_seqlen_kv=longest,
        )  # fmt: skip
    held = torch.arange(SEQ_LENGTH)
    if cp > 1:
        rank = mpu.get_context_parallel_rank()
        held = token_indices(SEQ_LENGTH, cp, rank, borders, torch.device("cpu"))
    mine = {k: row[k][held][None] for k in ("tokens", "labels", "loss_mask", "position_ids")}
    loss = model(
        mine["tokens"], mine["position_ids"], None, labels=mine["labels"], packed_seq_params=packed
    )
    return loss[0], mine["loss_mask"][0], held


def _run(model_path, data_path, packing, cp):
    """(loss of each supervised token by conversation, DFT gradient by parameter)."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from megatron_dft.data.dataset import build_dataset
    from megatron_dft.data.options import DatasetOptions
    from megatron_dft.data.tokenizer import load_tokenizer
    from megatron_dft.hf.load import load_hf_weights
    from megatron_dft.hf.source import open_checkpoint

    megatron_model.start(context_parallel_size=cp)
    models = megatron_model.build(model_path, context_parallel_size=cp)
    load_hf_weights(models, open_checkpoint(model_path))
    data = build_dataset(
        [data_path],
        load_tokenizer(model_path),
        DatasetOptions(
            seq_length=SEQ_LENGTH,
            packing=packing,
            shuffle=False,
            pad_multiple=2 * cp if cp > 1 else 1,
        ),
    )
    losses: dict[int, list[float]] = {}
    for index in range(len(data)):
        row = data[index]
        loss, mask, held = _forward(models[0], row, cp)
        prob = torch.exp(-loss.detach())
        torch.where(mask.bool(), prob * loss, 0.0).sum().backward()
        whole = torch.zeros(SEQ_LENGTH)
        whole[held] = torch.where(mask.bool(), loss.detach(), torch.nan)
        if cp > 1:
            dist.all_reduce(whole, group=mpu.get_context_parallel_group())
        begin = 0
        for member in data.plan.members(index).tolist():
            size = len(data.conversations[member]) - 1
            part = whole[begin : begin + size]
            losses[member] = part[~part.isnan()].tolist()
            begin += -(-size // data.pad_multiple) * data.pad_multiple
    gradients = {n: p.grad for n, p in models[0].named_parameters()}
    if cp > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=mpu.get_context_parallel_group())
    return losses, {n: g.numpy() for n, g in gradients.items()}, len(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed")
    model = make_tiny("qwen3", directory / "model", num_hidden_layers=2)
    rows = [
        {"messages": chat(f"q{i}?", "ab" * (1 + i * 5 % 7), *(("u", "v" * i) if i % 2 else ()))}
        for i in range(7)
    ]
    data = write_jsonl(directory / "a.jsonl", rows)
    cases = {"alone": (False, 1), "packed": (True, 1), "packed cp2": (True, 2)}
    return {
        name: run_ranks(_run, cp, model, data, packing, cp)[0]
        for name, (packing, cp) in cases.items()
    }


@pytest.mark.parametrize("case", ["packed", "packed cp2"])
def test_losses_and_dft_gradients_are_those_of_each_conversation_alone(runs, case):
    expected, expected_gradients, rows = runs["alone"]
    got, gradients, packed_rows = runs[case]
    assert rows == 7 and packed_rows < 7 and sorted(got) == sorted(expected) == list(range(7))
    for member, losses in expected.items():
        assert len(losses) > 2 and got[member] == pytest.approx(losses, abs=1e-5), member
    for name, gradient in expected_gradients.items():
        assert abs(gradient).max() > 0, name
        assert abs(gradients[name] - gradient).max() <= 1e-5 * max(1, abs(gradient).max()), name
