"""One training run of the GPU suite: `megatron_dft.train` with what a measurement needs.

python -m tests.gpu.launch [--hide PACKAGE] [--figures FILE] [--plain] [--profile FILE]
    [--gate FILE] [--share-gpu] [--fusion] [--allow FLAG] [--env NAME=VALUE]
    [--fork-writer] -- FLAGS
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main() -> int:
    """The exit status of the run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hide", action="append", default=[], help="import fails as if absent")
    parser.add_argument("--fork-writer", action="store_true", help="--async-save on a CPU too")
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE, before any import")
    parser.add_argument("--allow", action="append", default=[], help="a refused flag's destination")
    parser.add_argument("--figures", type=Path, help="each step's figures, one JSON object a line")
    parser.add_argument("--plain", action="store_true", help="Megatron's own plain loss function")
    parser.add_argument("--profile", type=Path, help="kernels and gaps of step 10, as JSON")
    parser.add_argument("--gate", type=Path, help="read all, then wait until this file is there")
    parser.add_argument("--share-gpu", action="store_true", help="every rank on the first GPU")
    parser.add_argument("--fusion", action="store_true", help="fuse dW on a CPU too")
    at = sys.argv.index("--")
    given, flags = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    os.environ.update(setting.split("=", 1) for setting in given.env)
    for name in given.hide:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in given.allow:
        _allow(name)
    if given.share_gpu:
        _share_gpu()
    if given.fork_writer:
        _fork_writer()
    if given.fusion:
        _fuse()
    from megatron_dft import train

    work = train._train

    def hooked(args: Any) -> None:
        if given.figures is not None:
            _write_figures(given.figures)
        if given.plain:
            _plain_loss()
        if given.profile is not None:
            _profile(given.profile)
        while given.gate is not None and not given.gate.exists():
            time.sleep(0.05)
        work(args)

    train._train = hooked
    return train.main(flags)


def _allow(name: str) -> None:
    """Lift a refusal, to see what the refused thing does."""
    from megatron_dft.flags import megatron

    del megatron._REFUSED[name]


def _share_gpu() -> None:
    """A rank is put on the GPU of its number by Megatron; gloo, unlike NCCL, takes one for all."""
    import torch

    choose, start = torch.cuda.set_device, torch.distributed.init_process_group

    def init_process_group(*args: Any, device_id: Any = None, **kwargs: Any) -> None:
        start(*args, **kwargs)

    torch.cuda.set_device = lambda device: choose(0)
    torch.distributed.init_process_group = init_process_group


def _fork_writer() -> None:
    """Megatron spawns a writer of checkpoints, which asks for CUDA; a fork has the CPU runtime."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from megatron_dft.flags import device

    start = PersistentAsyncCaller._get_process

    def _get_process(rank: int, mp_mode: str = "spawn", *priorities: Any) -> Any:
        return start(rank, "fork", *priorities)

    PersistentAsyncCaller._get_process = _get_process
    device._check_async_save = lambda args, on_cpu: None


def _fuse() -> None:
    """What a GPU does by default: dW is added to main_grad by the stand-in for apex's module."""
    from megatron_dft.compat import wgrad_fusion
    from megatron_dft.flags import defaults

    wgrad_fusion.install()
    defaults.CPU_DEFAULTS["gradient_accumulation_fusion"] = True


def _write_figures(path: Path) -> None:
    from tests.train import listener

    file = path.open("w", buffering=1)
    listener.on_figures(lambda figures: print(json.dumps(figures), file=file))


def _plain_loss() -> None:
    """The loss of Megatron's pretrain_gpt.py: masked cross entropy, one figure, nothing probed."""
    from functools import partial

    import torch

    from megatron_dft.step import forward_step
    from megatron_dft.training import model

    def loss_func(batch: Any, output: Any, model: Any = None) -> Any:
        mask = batch.loss_mask.view(-1)
        loss = torch.sum(output.view(-1).float() * mask)
        count = mask.sum().detach().to(torch.int)
        report = torch.cat([loss.detach().clone().view(1), count.view(1).float()])
        return loss, count, {"lm loss": report}

    def step(iterator: Any, chunk: Any) -> Any:
        batch, output = forward_step.run_model(iterator, chunk)
        return output, partial(loss_func, batch, model=chunk)

    forward_step.forward_step = step
    model.LogitsProbe = lambda chunk, *args, **named: setattr(chunk, "dft_probe", SimpleNamespace())
    model.SelfTest.run = lambda self, chunked: 0.0


def _profile(path: Path, step: int = 10) -> None:
    """Sum each kernel's time in one step, and the time in which none ran."""
    from torch.profiler import ProfilerActivity, profile

    from megatron_dft.cpu import runtime
    from megatron_dft.training.output import Output

    on_gpu = not runtime.is_active()
    profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])

    plain = Output._after_step  # the loop's callback after a step is one, and taken

    def after(self: Any, chunks: Any, iteration: int) -> None:
        plain(self, chunks, iteration)
        if iteration == step - 1:
            profiler.start()
        elif iteration == step:
            import torch

            torch.cuda.synchronize()
            profiler.stop()
            path.write_text(json.dumps(_kernels(profiler.events(), on_gpu), indent=1))

    Output._after_step = after  # type: ignore[method-assign]


def _kernels(events: Any, on_gpu: bool) -> dict[str, Any]:
    """{"span_ms", "busy_ms", "gap_ms", "kernels": [[name, ms, calls], …]} of a profile's events."""
    device = "CUDA" if on_gpu else "CPU"
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if str(getattr(e, "device_type", "")).endswith(device)
    )
    table: dict[str, list[float]] = {}
    busy, reached = 0.0, 0.0
    for start, end, name in spans:
        entry = table.setdefault(name[:120], [0.0, 0])
        entry[0] += (end - start) / 1e3
        entry[1] += 1
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = (spans[-1][1] - spans[0][0]) / 1e3 if spans else 0.0
    rows = sorted(([n, t, c] for n, (t, c) in table.items()), key=lambda row: -row[1])
    return {"span_ms": span, "busy_ms": busy / 1e3, "gap_ms": span - busy / 1e3, "kernels": rows}


if __name__ == "__main__":
    sys.exit(main())
