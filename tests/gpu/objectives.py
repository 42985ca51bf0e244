"""Every objective's gradient as the self-test takes it, on the GPU, every route, packed and not:
against float64.

`python -m tests.gpu.objectives [--device cpu]`; status 0 only if each is within its dtype's bound.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist

from tests.ranks import free_port
from tests.step.stand_in import CASES, run

# name, from the hidden states, with our cross entropy
WAYS = (
    ("logits with Megatron's cross entropy", False, False),
    ("logits with ours", False, True),
    ("head", True, False),
)
# Of the largest entry. The head's dW and d hidden are sums over 16 tokens and 256 words, whose
# roundings (2⁻²⁴ each) add up to √(16 · 256) · 2⁻²⁴ · ¼ = 1e-5 at least, in an order that a kernel
# chooses; 1.2e-5 is seen on a CPU. bf16 keeps 2⁻⁹ of a gradient, and of the factors of such sums.
BOUND = {torch.float32: (1e-5, 4e-5), torch.bfloat16: (1e-2, 3e-2)}  # from logits, of the head


def main() -> int:
    """One line a route, layout and dtype."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    on_cpu = parser.parse_args().device == "cpu"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if on_cpu:
        from megatron_dft.cpu import runtime

        runtime.activate()
    torch.cuda.set_device(0)
    backend = "gloo" if on_cpu else "nccl"
    dist.init_process_group(backend, rank=0, world_size=1, device_id=torch.device("cuda:0"))
    red = 0
    for dtype, bounds in BOUND.items():
        for name, chunked, own in WAYS:
            bound = bounds[chunked]
            for packing in (True, False):
                found = run(list(CASES), chunked, dtype, packing, own=own)
                bad = {c: e for c, e in found.items() if isinstance(e, str) or e > bound}
                red += len(bad)
                largest = max((e for e in found.values() if not isinstance(e, str)), default=0.0)
                print(f"{name}, {'packed' if packing else 'rows'}, {dtype}: "
                      f"{len(found)} objectives, error at most {largest:.1e}; red: {bad or 'none'}",
                      flush=True)  # fmt: skip
    dist.destroy_process_group()
    print(f"{red} gradients are not the formula's")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
