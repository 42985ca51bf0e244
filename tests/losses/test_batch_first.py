"""The linear head with [b, s, h] hidden states, and shapes that it refuses."""

import pytest
import torch
import torch.distributed as dist

from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from tests.losses.test_linear_head import BATCH, HIDDEN, PADDED, SEQUENCE, VOCAB, make_case
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "--loss-chunk-size: expected at least 1 token"),
        ({"objective": registry.get("asft")}, "--loss asft: needs the reference"),
        ({"objective": registry.get("talr"), "design": "forward"}, "expected 'recompute'"),
        ({"design": "fast"}, "design: expected one of auto"),
        ({"objective": "dtf"}, "--loss: expected one of sft, dft"),
        (
            {"labels": torch.zeros(SEQUENCE, BATCH, dtype=torch.int64)},
            r"hidden: expected the shape \(2, 12, 16\).*batch_first=True.*transpose labels",
        ),
        ({"batch_first": True}, r"expected the shape \(2, 12, 16\).*leave out batch_first"),
        (
            {"labels": torch.zeros(BATCH, SEQUENCE - 1, dtype=torch.int64)},
            r"ids\[:, :-1\] go with the labels ids\[:, 1:\]",
        ),
        ({"labels": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"labels: expected \[b, s\] or"),
        ({"mask": torch.ones(SEQUENCE, BATCH)}, r"mask: .*transpose it: mask.t\(\)"),
        ({"mask": torch.ones(BATCH, 1)}, r"mask: expected the shape \(2, 12\)"),
        (
            {"stats": {"reference_log_prob": torch.ones(SEQUENCE, BATCH)}},
            r"reference_log_prob: .*transpose it",
        ),
        ({"weight": torch.ones(HIDDEN, VOCAB)}, r"weight: expected .*transpose it: weight.t\(\)"),
        (
            {"reference_logits": torch.ones(BATCH, SEQUENCE, PADDED)},
            r"reference_logits: .*transpose them",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(change, message):
    case = make_case(0, torch.float32)
    arguments = {"weight": case["weight"], "labels": case["labels"], "objective": "dft", **change}
    with pytest.raises(ValueError, match=message):
        linear_head_loss(case["hidden"], **arguments)


def _batch_first(name, sequence_parallel, design):
    """Of this rank: ([b, s, h] loss, d_hidden, dW) and those of the same, sequence first."""
    case = make_case(5, torch.float64)
    group = dist.group.WORLD if dist.is_initialized() else None
    found = []
    for batch_first in (False, True):
        hidden, case_weight = case["hidden"], case["weight"]
        if sequence_parallel:
            hidden = hidden.chunk(2)[dist.get_rank()]
        if group is not None:
            case_weight = case_weight.chunk(2)[dist.get_rank()]
        options = {}
        if name == "asft":
            reference = torch.nn.functional.pad(case["reference"], (0, PADDED - VOCAB))
            reference = reference.view(BATCH, SEQUENCE, PADDED)
            if group is not None:
                reference = reference.chunk(2, -1)[dist.get_rank()]
            options["reference_logits"] = reference if batch_first else reference.transpose(0, 1)
        if batch_first:
            hidden = hidden.transpose(0, 1).contiguous()
        hidden, weight = hidden.clone().requires_grad_(), case_weight.clone().requires_grad_()
        out = linear_head_loss(
            hidden,
            weight,
            case["labels"],
            objective=name,
            batch_first=batch_first,
            mask=case["mask"],
            group=group,
            sequence_parallel=sequence_parallel,
            vocab_size=VOCAB,
            stats={"segment_ids": case["segments"]},
            design=design,
            chunk_size=5,
            **options,
        )
        (out.loss * case["upstream"]).sum().backward()
        grad = hidden.grad.transpose(0, 1) if batch_first else hidden.grad
        found.append((out.loss.detach(), out.weight, grad, weight.grad))
    return found


@pytest.mark.parametrize(
    ("ranks", "sequence_parallel", "name", "design"),
    [
        (1, False, "dft", "forward"),
        (1, False, "dft-sequence", "recompute"),
        (1, False, "asft", "recompute"),
        (2, False, "asft", "recompute"),
        (2, True, "asft", "recompute"),
    ],
)
def test_batch_first_is_the_same_loss(ranks, sequence_parallel, name, design):
    arguments = (name, sequence_parallel, design)
    found = [_batch_first(*arguments)] if ranks == 1 else run_ranks(_batch_first, 2, *arguments)
    for sequence_first, batch_first in found:
        assert sequence_first[2].any() and sequence_first[3].any()
        torch.testing.assert_close(batch_first, sequence_first, rtol=1e-12, atol=1e-14)


def test_batch_first_is_not_guessed_where_the_axes_are_alike():
    hidden, weight = torch.randn(4, 4, 8).double(), torch.randn(9, 8).double()
    labels = torch.randint(9, (4, 4))
    log_prob = (hidden @ weight.t()).log_softmax(-1)
    for batch_first, order in ((True, log_prob), (False, log_prob.transpose(0, 1))):
        out = linear_head_loss(hidden, weight, labels, objective="sft", batch_first=batch_first)
        exact = -order.gather(2, labels.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(out.loss, exact, rtol=1e-12, atol=1e-12)
