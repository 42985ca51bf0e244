"""Which rows are supervised is known on the host, and telling the GPU does not wait for it."""

import torch
from torch.overrides import TorchFunctionMode

from megatron_dft.losses.supervised_rows import SupervisedRows, on_device


class _Copies(TorchFunctionMode):
    """Notes every copy to another device, and leaves it out."""

    def __init__(self) -> None:
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.pin_memory:
            self.seen.append("pinned")
            return args[0]
        if function is torch.Tensor.to:
            self.seen.append((str(args[1]), (kwargs or {}).get("non_blocking", False)))
            return args[0]
        return function(*args, **(kwargs or {}))


def test_a_copy_to_a_gpu_is_pinned_and_not_waited_for():
    mask = torch.tensor([True, False, True, True])
    with _Copies() as copies:
        rows = SupervisedRows(mask, None, False, torch.device("cuda"))
        on_device(mask, torch.device("cpu"))
    assert copies.seen == ["pinned", ("cuda", True), ("cpu", False)]
    assert rows.index.tolist() == [0, 2, 3] and not rows.all
