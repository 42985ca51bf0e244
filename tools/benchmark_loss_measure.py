"""One turn of a method of tools/benchmark_loss.py: time, peak memory, collectives, gradients."""

import gc
import os
import threading
import time
from pathlib import Path

import benchmark_loss_methods as methods
import torch
import torch.distributed as dist

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
MIB = 2**20


class Communication:
    """Counts collectives and the bytes of their input tensors."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        for name in COLLECTIVES:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, original):
        def call(*args, **kwargs):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            self.calls += 1
            self.bytes += tensors[-1].numel() * tensors[-1].element_size()
            return original(*args, **kwargs)

        return call

    def take(self) -> tuple[int, int]:
        """(calls, bytes) since the last take."""
        taken, self.calls, self.bytes = (self.calls, self.bytes), 0, 0
        return taken


class PeakMemory:
    """Highest memory in use within the block: the allocator's on a GPU, else the resident set."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return self
        self.base = self.top = self._resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.top = max(self.top, self._resident())

    def __exit__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.top = torch.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.thread.join()

    @property
    def mib(self) -> float:
        return (self.top - self.base) / MIB


class Inputs:
    """Leaves, labels and mask of a case; half of the targets are the model's first choice, so that
    neither all weights nor all gradients are nothing."""

    def __init__(self, case: dict, source: str, dtype: str) -> None:
        device, tokens, rows = case["device"], case["tokens"], case["rows"]
        g = torch.Generator(device).manual_seed(1)

        def normal(scale: float, *shape: int) -> torch.Tensor:
            x = torch.randn(*shape, generator=g, device=device, dtype=DTYPES[dtype])
            return x.mul_(scale)

        self.labels = torch.randint(case["vocab"], (tokens,), generator=g, device=device)
        if source == "hidden":
            size = case["hidden"]
            self.sources = [normal(1.0, tokens, size), normal(4.0 / size**0.5, rows, size)]
        else:
            self.sources = [normal(3.0, tokens, rows)]
        if rows == case["vocab"]:
            likely = torch.rand(tokens, generator=g, device=device) < 0.5
            self.labels = torch.where(likely, self._first_choice(), self.labels)
        draw = torch.rand(tokens, generator=g, device=device)
        self.mask = (draw < case["supervised"]).float()

    def _first_choice(self) -> torch.Tensor:
        if len(self.sources) == 1:
            return self.sources[0].argmax(1)
        hidden, weight = self.sources
        return torch.cat([(part @ weight.t()).argmax(1) for part in hidden.split(256)])

    def leaves(self) -> list[torch.Tensor]:
        return [x.clone().requires_grad_() for x in self.sources]


def gradient_difference(leaves: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Largest relative difference, in the norm, of a method's gradients to the first method's."""
    return max(
        float((x.grad - y).float().norm() / y.float().norm().clamp(min=1e-30))
        for x, y in zip(leaves, exact, strict=True)
        if x.grad is not None
    )


def measure(name, inputs, options, group, communication, exact=None) -> dict:
    """One forward and backward of a method on fresh leaves; `exact` gradients are compared with."""
    leaves = inputs.leaves()
    loss_of = methods.method(name, options.source, options.chunk_size, leaves)
    gc.collect()
    dist.barrier(group)
    communication.take()
    with PeakMemory() as memory:
        cpu, start = time.process_time(), time.perf_counter()
        loss = loss_of(*leaves, inputs.labels, inputs.mask, group)
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    calls, sent = communication.take()
    gradients = [x.grad for x in leaves if x.grad is not None]
    returned = sum(x.numel() * x.element_size() for x in gradients)
    if options.source == "logits":  # the gradient of the logits is what a method may save
        returned = 0
    row = {"s": wall, "cpu-s": cpu, "MiB": memory.mib - returned / MIB, "loss": float(loss)}
    row |= {"collectives": calls, "comm-MiB": sent / MIB}
    if exact is not None:
        row["gradient"] = gradient_difference(leaves, exact)
    elif name == methods.BASELINE:
        row["exact"] = [x.detach() for x in gradients]
    return row
