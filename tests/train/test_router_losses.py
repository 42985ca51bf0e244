"""A router's auxiliary and z losses: the gradient that the flags name, however much is padding.

The reference is transformers' model and the formulas (Switch Transformers, arXiv 2101.03961;
ST-MoE, 2202.08906) on rows without padding: the mean over the step's rows, each a micro-batch.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.hf.tiny import make_tiny
from tests.train.launch import flags, run_train
from tests.train.reference import read_rows

# So large that the loss of the tokens is nothing beside it.
COEFFICIENT = 1e4
ROWS = 8


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Every row of the embedding is non-zero, the padding token's too: padding would be seen."""
    directory = make_tiny("qwen3-moe", tmp_path_factory.mktemp("moe") / "model")
    weights = load_file(directory / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding.copy_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _inputs(model, data):
    """Each conversation's tokens up to the last one that predicts a supervised token."""
    for ids, trained in read_rows(model, data)[:ROWS]:
        last = max(i for i, mine in enumerate(trained) if mine)
        yield torch.tensor([ids[:last]])


def _gradient_norm(model, data, kind):
    """Of the mean over rows and sum over layers, per unit of the coefficient."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference.model.embed_tokens.padding_idx = None
    experts, top = reference.config.num_experts, reference.config.num_experts_per_tok
    for ids in _inputs(model, data):
        for logits in reference(ids, output_router_logits=True).router_logits:
            tokens = len(logits)
            if kind == "z":
                loss = logits.logsumexp(-1).square().mean()
            else:
                share = logits.softmax(-1)
                sent = torch.zeros(experts)
                sent.index_add_(0, share.topk(top).indices.flatten(), torch.ones(tokens * top))
                loss = experts * (share.mean(0) * sent / (tokens * top)).sum()
            (loss / ROWS).backward(retain_graph=True)
    grads = [p.grad.flatten() for p in reference.parameters() if p.grad is not None]
    return float(torch.cat(grads).norm())


FLAGS = {
    "auxiliary": dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=COEFFICIENT),
    "z": dict(moe_z_loss_coeff=COEFFICIENT),
}
LAYOUTS = {
    "twice the padding": (1, dict(seq_length=128)),
    "recomputed": (
        1, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    ),
    "tp2-sp-pp2": (
        4,
        dict(
            tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1,
            pipeline_model_parallel_size=2,
        ),
    ),
    "cp2": (2, dict(context_parallel_size=2)),
}  # fmt: skip
RUNS = [("auxiliary", layout) for layout in LAYOUTS]
RUNS += [("z", layout) for layout in ("twice the padding", "tp2-sp-pp2")]


@pytest.fixture(scope="module")
def expected(moe, chats):
    return {kind: _gradient_norm(moe, chats, kind) for kind in FLAGS}


@pytest.fixture(scope="module")
def in_order(chats, tmp_path_factory):
    """The first rows alone: a step of all of them is the same in any order."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(chats.read_text().splitlines(keepends=True)[:ROWS]))
    return path


@pytest.mark.parametrize(("kind", "layout"), RUNS)
def test_the_gradient_is_the_coefficient_times_the_reference_s(
    moe, in_order, expected, kind, layout
):
    ranks, given = LAYOUTS[layout]
    argv = flags(
        moe, in_order, micro_batch_size=1, global_batch_size=ROWS, train_iters=1,
        **{**FLAGS[kind], **given},
    )  # fmt: skip
    (figures,) = run_train(ranks, *argv)
    assert figures["grad_norm"] == pytest.approx(COEFFICIENT * expected[kind], rel=1e-3)
