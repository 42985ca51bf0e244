"""Prints the GPU's bf16 matrix rate in TFLOPS: the median of products of two 8,192 × 8,192."""

import statistics

import torch

SIZE = 8192


def main() -> None:
    """Twenty products, the first ones to warm up."""
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    print(2 * SIZE**3 / (statistics.median(times[5:]) / 1e3) / 1e12)


if __name__ == "__main__":
    main()
