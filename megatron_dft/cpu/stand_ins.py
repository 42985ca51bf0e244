"""What stands in for CUDA on a CPU: placements, streams, events, generators, calls that do nothing.

The table of runtime.py says where each of them goes and why.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _to_cpu(device: Any) -> Any:
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    # A bare integer is a CUDA ordinal; bool is an int but never a device.
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    return device


class CpuMode(TorchFunctionMode):
    """Sends every CUDA placement to the CPU and names tensor types as CUDA's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _to_cpu(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to:
            # Positions after the tensor may hold a dtype, a device or another tensor.
            args = (
                args[0],
                *(_to_cpu(a) if isinstance(a, str | torch.device) else a for a in args[1:]),
            )
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class Stream:
    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    def wait_event(self, *args):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def record_event(self, event=None):
        return event or Event()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

    @staticmethod
    def priority_range():
        return (0, 0)


class Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    def wait(self, *args):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class Generators:
    """`torch.cuda.default_generators` has one generator a device; the CPU has one in all."""

    def __getitem__(self, index):
        return torch.default_generator

    def __len__(self):
        return 1


def nothing(*args, **kwargs):
    return None


def zero(*args, **kwargs):
    return 0


def on_host(tensor, as_numpy=False, record_stream=False):
    """The tensor, which is in host memory, or its numpy array."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def call_now(function, **kwargs):
    function()


def without(function, *names, **fixed):
    """`function` called without the keyword arguments `names`, and with those of `fixed`."""

    def call(*args, **kwargs):
        for name in names:
            kwargs.pop(name, None)
        return function(*args, **{**kwargs, **fixed})

    return call
