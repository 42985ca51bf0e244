"""Peak memory stays within four times the largest tensor, whatever the format."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.drift.reference import write

# The memory that a process holds is measured in one of its own: the test's may shrink meanwhile.
_PROGRAM = """
import sys, torch
from pathlib import Path
from tools.drift_speed import drift_pass, peak_growth
(torch.randn(300, 300) @ torch.randn(300, 300)).svd()  # load the libraries
ks = tuple(map(int, sys.argv[3:]))
print(peak_growth(lambda: drift_pass(*map(Path, sys.argv[1:3]), workers=4, ks=ks)))
"""


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
@pytest.mark.parametrize("form", ["safetensors", "torch_dist"])
def test_four_times_the_largest_tensor(form, dtype, tmp_path):
    # With the base's subspaces (a float32 copy and two bases) and without.
    ks = ("1", "64") if form == "safetensors" else ()
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
        [sys.executable, "-c", _PROGRAM, tmp_path / "a", tmp_path / "b", *ks],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    # Less than one update would mean that the workers' memory was not seen.
    assert 1 <= int(run.stdout) / largest <= 4
