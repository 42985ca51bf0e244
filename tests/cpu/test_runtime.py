"""The CPU runtime: reversible, idempotent, and loud where an attribute moved."""

import pytest
import torch

from tests.ranks import run_ranks


def _round_trip():
    from megatron_dft.cpu import runtime

    rows = runtime._replacements()
    before = [getattr(owner, name) for owner, name, _ in rows]
    runtime.activate()
    runtime.activate()
    x = torch.zeros(2, device="cuda")
    inside = (
        torch.cuda.is_available(),
        x.device.type,
        x.cuda().device.type,
        x.to("cuda:0").to(torch.device("cuda", 0)).device.type,
        x.type(),
        x.type(torch.float64).dtype,
        torch.ones(1, device=0).device.type,
        torch.tensor([1], pin_memory=True).item(),
        torch.cuda.device_count(),
    )
    runtime.deactivate()
    runtime.deactivate()
    after = [getattr(owner, name) for owner, name, _ in rows]
    return inside, all(a is b for a, b in zip(before, after, strict=True)), x.type()


def test_it_answers_as_a_cpu_and_puts_everything_back():
    inside, restored, type_after = run_ranks(_round_trip, 1)[0]
    cuda = "torch.cuda.FloatTensor"
    assert inside == (True, "cpu", "cpu", "cpu", cuda, torch.float64, "cpu", 1, 1)
    assert restored and type_after == "torch.FloatTensor"


def _moved():
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_dft.cpu import runtime

    del gpt_layer_specs.LNImpl
    runtime.activate()


def test_a_moved_attribute_is_named():
    with pytest.raises(RuntimeError, match="gpt_layer_specs.LNImpl"):
        run_ranks(_moved, 1)


def test_every_replaced_place_stands_in_the_module_s_table():
    from megatron_dft.cpu import runtime

    table = runtime.__doc__
    for word in ("Stream", "memory_", "LocalSpecProvider", "DataLoader"):
        assert word in table
