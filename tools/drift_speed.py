"""Time the drift statistics of a pair beside a bare numpy pass over the same two files.

    python tools/drift_speed.py BASE TUNED [--repeats 5] [--principal-k 1 8 64]

The bare pass reads both safetensors files tensor by tensor, subtracts and takes the norm, in numpy
(bfloat16 is widened by shifting, numpy has no such type). Both run in this process, in turn, with
the files in the page cache; imports are not timed. Prints wall seconds, medians and quartiles, and
the ratio of the medians: on a virtual machine page faults make the bare pass up to four times
slower from one run to the next, so a best time says little. Then, in a run of its own, the peak of
the memory that the process and its workers hold together beyond the start, in units of the largest
tensor (proportional set size, sampled).
"""

import argparse
import json
import statistics
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

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


def drift_pass(
    base: Path, tuned: Path, workers: int | None = None, ks: tuple[int, ...] = ()
) -> float:
    left, right = open_checkpoint(base), open_checkpoint(tuned)
    names = match(left, right).names
    summary = Summary(["tuned"])
    for tensor in Comparison(left, [right], names, workers, principal_ks=ks).run():
        summary.add(tensor)
    return summary.report()["methods"]["tuned"]["model"]["update_norm"]


def _held() -> int:
    """Proportional set size in bytes of this process and its children; shared pages count once."""
    total = 0
    me = psutil.Process()
    for pid in (me.pid, *(child.pid for child in me.children())):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))
    return total


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which the anonymous memory grew at its peak while `function` ran, children's too."""
    before, samples, done = _held(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(_held())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        function()
    finally:
        done.set()
        sampler.join()
    return max(samples) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--principal-k", type=int, nargs="*", default=[], metavar="K")
    args = parser.parse_args()
    ks = tuple(args.principal_k)

    def drift(base: Path, tuned: Path) -> float:
        return drift_pass(base, tuned, ks=ks)

    drift(args.base, args.tuned)  # fills the page cache
    times: dict[str, list[float]] = {"numpy": [], "drift": []}
    for _ in range(args.repeats):
        for name, function in (("numpy", numpy_pass), ("drift", drift)):
            begin = time.perf_counter()
            norm = function(args.base, args.tuned)
            times[name].append(time.perf_counter() - begin)
            print(f"{name}: {times[name][-1]:.3f} s, ‖Δ‖ = {norm:.6f}")
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        print(f"{name}: median {middle:.3f} s, quartiles {low:.3f} to {high:.3f}")
    ratio = statistics.median(times["drift"]) / statistics.median(times["numpy"])
    print(f"ratio of the medians: {ratio:.2f}")
    largest = max(t.nbytes for t in open_checkpoint(args.base).tensors.values())
    grown = peak_growth(lambda: drift(args.base, args.tuned))
    print(f"peak: {grown / 2**20:.0f} MiB = {grown / largest:.2f} x the largest tensor")


if __name__ == "__main__":
    main()
