"""A rehearsal of the GPU suite without a GPU: the same lines, on the CPU, at tiny shapes.

Every line that means something there is parsed, run and judged: by its exit status, its words and
its figures. A run is a fork of a server that has imported Megatron once, which saves 10 s a run.
"""

import dataclasses
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

from tests.gpu.plan import SHAPES, Run
from tests.gpu.processes import TIME_IS_OUT

ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",  # AMX that virtual machines announce and lack
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# What the CPU runtime refuses, and what would be too large.
_NOT_HERE = ("require_fused_attention", "moe_grouped_gemm", "attention_backend")
# Words of a GPU's block at the start of a run.
_NOT_SAID = ("software:", "gradient accumulation fusion:", "attention of")
_SMALL = dict(seq_length=128, make_vocab_size_divisible_by=8)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def here(run: Run) -> Run:
    """The run as a machine without a GPU can have it."""
    flags = {name: value for name, value in run.flags.items() if name not in _NOT_HERE}
    flags["device"] = "cpu"
    if run.model in SHAPES:
        flags.update(_SMALL)
    if run.flags.get("device") != "cpu":
        flags.setdefault("loss_route", "auto")  # as a GPU has it
    # Gradient accumulation fusion, which a GPU has by default, and which the heads' dW goes by.
    fused = not flags.get("no_gradient_accumulation_fusion") and run.flags.get("device") != "cpu"
    launch = run.launch + (("--fusion",) if fused and not run.program else ())
    launch += ("--fork-writer",) if "async_save" in flags else ()
    says = tuple(words for words in run.says if not words.startswith(_NOT_SAID))
    return dataclasses.replace(run, flags=flags, launch=launch, says=says)


def launch(words: list[str], ranks: int, log: Path, limit: float, env: dict[str, str]) -> int:
    """`python -m tests.gpu.launch WORDS` on `ranks` processes; status or TIME_IS_OUT."""
    log.write_text("")
    children = [_context.Process(target=_child, args=(words, r, ranks, log, env))
                for r in range(ranks)]  # fmt: skip
    for child in children:
        child.start()
    until = time.monotonic() + limit
    for child in children:
        child.join(max(until - time.monotonic(), 0))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    if None in codes:
        return TIME_IS_OUT
    return next((code for code in codes if code), 0)


def _child(words: list[str], rank: int, ranks: int, log: Path, env: dict[str, str]) -> None:
    os.environ.update(env)
    if ranks > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        os.environ.update(dict(zip(names, map(str, (rank, rank, ranks, ranks)), strict=True)))
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["launch", *words]
    status = 1
    try:
        from tests.gpu.launch import main

        status = main()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    for helper in multiprocessing.active_children():  # as an interpreter does that ends by itself
        helper.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
