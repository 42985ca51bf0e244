"""Every objective's gradient on the GPU, every route, packed and not: against float64.

`python -m tests.gpu.objectives`; status 0 only if each is within its dtype's bound.
"""

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
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def main() -> int:
    """One line a route, layout and dtype."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda:0"))
    red = 0
    for dtype, bound in BOUND.items():
        for name, chunked, own in WAYS:
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
