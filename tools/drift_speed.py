"""Time the drift statistics of a pair beside a bare numpy pass over the same two files.

    python tools/drift_speed.py BASE TUNED [--repeats 5]

The bare pass reads both safetensors files tensor by tensor, subtracts and takes the norm, in numpy
(bfloat16 is widened by shifting, numpy has no such type). Both run in this process, in turn, with
the files in the page cache; imports are not timed. Prints wall and CPU seconds, the ratio of the
best times, and the growth of the peak resident memory in units of the largest tensor.
"""

import argparse
import json
import resource
import struct
import time
from pathlib import Path

import numpy as np

from megatron_dft.drift.checkpoint import open_checkpoint
from megatron_dft.drift.compare import Comparison
from megatron_dft.drift.pair import match
from megatron_dft.drift.summary import Summary


def _tensors(path: Path):
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                handle.seek(8 + length + begin)
                if entry["dtype"] == "F32":
                    yield name, np.fromfile(handle, np.float32, (end - begin) // 4)
                elif entry["dtype"] == "BF16":
                    bits = np.fromfile(handle, np.uint16, (end - begin) // 2)
                    yield name, (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
                else:
                    raise ValueError(f"{file}: {entry['dtype']} is not timed; use F32 or BF16")


def numpy_pass(base: Path, tuned: Path) -> float:
    total = 0.0
    for (left, a), (right, b) in zip(_tensors(base), _tensors(tuned), strict=True):
        assert left == right
        total += float(np.linalg.norm(b - a)) ** 2
    return total**0.5


def drift_pass(base: Path, tuned: Path) -> float:
    left, right = open_checkpoint(base), open_checkpoint(tuned)
    names = match(left, right).names
    summary = Summary(["tuned"])
    for tensor in Comparison(left, [right], names).run():
        summary.add(tensor)
    return summary.report()["methods"]["tuned"]["model"]["update_norm"]


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    largest = max(t.nbytes for t in open_checkpoint(args.base).tensors.values()) / 2**20
    before = _peak_mib()
    drift_pass(args.base, args.tuned)  # also fills the page cache
    grown = _peak_mib() - before
    best: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, function in (("numpy", numpy_pass), ("drift", drift_pass)):
            wall, cpu = time.perf_counter(), time.process_time()
            norm = function(args.base, args.tuned)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"{name}: {wall:.3f} s wall, {cpu:.3f} s CPU, ‖Δ‖ = {norm:.6f}")
            best[name] = min(wall, best.get(name, wall))
    print(f"ratio of the best: {best['drift'] / best['numpy']:.2f}")
    print(f"peak memory grew by {grown:.0f} MiB = {grown / largest:.2f} x the largest tensor")


if __name__ == "__main__":
    main()
