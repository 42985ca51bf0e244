"""The rank runner itself: results in rank order, a failing rank's error surfaces."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _sum_of_ranks(offset):
    x = torch.tensor(float(dist.get_rank() + offset), requires_grad=True)
    (x * x).backward()
    total = x.grad.clone()
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _fail_on_one():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 is unhappy")
    dist.barrier()


def test_results_come_in_rank_order():
    assert run_ranks(_sum_of_ranks, 3, 1) == [(0, 12.0), (1, 12.0), (2, 12.0)]


def test_a_failing_rank_raises_its_error_and_the_others_are_ended():
    with pytest.raises(ValueError, match="rank 1 is unhappy"):
        run_ranks(_fail_on_one, 2)
