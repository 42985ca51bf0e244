"""Ranks wait for the one that reads the data, and leave with it where it refuses."""

import os
import time

import pytest

from tests.ranks import run_ranks


def _wait(refuses, reader):
    from megatron_dft.training import waiting

    rank, order = int(os.environ["RANK"]), []
    try:
        with waiting.met_after():
            order.append(time.monotonic())
            if rank == reader:
                time.sleep(1.0)
                if refuses:
                    raise ValueError("a bad row")
                order.append(time.monotonic())
    except ValueError as error:
        return type(error).__name__
    # torch's own rendezvous at the same address finds the store that is left.
    import torch

    torch.distributed.init_process_group("gloo")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return order[-1], time.monotonic(), float(total)


def _refuse_before_another_starts():
    """Rank 0 refuses at once; rank 1 comes to the meeting only when it has heard of that."""
    from megatron_dft.training import waiting

    rank = int(os.environ["RANK"])
    if rank == 1:
        while not os.path.exists(os.environ["TEST_REFUSED"]):
            time.sleep(0.05)
    try:
        with waiting.met_after():
            if rank == 0:
                open(os.environ["TEST_REFUSED"], "w").close()
                raise ValueError("a bad row")
    except ValueError as error:
        return type(error).__name__


def test_rank_0_keeps_its_store_for_those_that_start_late(tmp_path):
    env = {"TEST_REFUSED": str(tmp_path / "refused")}
    results = run_ranks(_refuse_before_another_starts, 3, init=False, timeout=60, env=env)
    assert results == ["ValueError", "OthersRefused", "OthersRefused"]


def test_nobody_goes_on_before_the_reader_is_done():
    results = run_ranks(_wait, 3, False, 1, init=False)
    ready = results[1][0]
    assert all(left >= ready and total == 3.0 for _, left, total in results)


@pytest.mark.parametrize("reader", [0, 1])
def test_a_refusal_ends_the_others(reader):
    results = run_ranks(_wait, 3, True, reader, init=False)
    assert results.pop(reader) == "ValueError"
    assert results == ["OthersRefused"] * 2
