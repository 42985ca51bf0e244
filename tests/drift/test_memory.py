"""Peak memory stays within four times the largest tensor, whatever the format."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.drift.reference import write

# The peak is a process's, and nothing lowers it again: measured in a process of its own.
_PROGRAM = """
import resource, sys, torch
from megatron_dft.drift.checkpoint import open_checkpoint
from megatron_dft.drift.compare import Comparison
from megatron_dft.drift.pair import match
from megatron_dft.drift.summary import Summary
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
(torch.randn(300, 300) @ torch.randn(300, 300)).svd()  # load the libraries
before = peak()
base, tuned = (open_checkpoint(p) for p in sys.argv[1:])
summary = Summary(["tuned"])
for tensor in Comparison(base, [tuned], match(base, tuned).names, workers=4).run():
    summary.add(tensor)
summary.report()
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "torch_dist"])
def test_four_times_the_largest_tensor(form, dtype, tmp_path):
    shape = (4096, 4096 if dtype == torch.float32 else 8192)
    largest = 64 * 2**20
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    for directory, value in (("a", 1.0), ("b", 1.25)):
        tensors = {n: torch.full(shape, value, dtype=dtype) for n in names}
        if form == "safetensors":
            write(tmp_path / directory, tensors)
        else:
            dcp.save(tensors, checkpoint_id=tmp_path / directory, no_dist=True)
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, tmp_path / "a", tmp_path / "b"],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(run.stdout) <= 4 * largest, f"{int(run.stdout) / largest:.2f} x the largest tensor"
