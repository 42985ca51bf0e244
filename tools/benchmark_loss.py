"""Time, peak memory and communication of DFT losses, side by side in one run.

    python tools/benchmark_loss.py                          # the target shape, from hidden states
    python tools/benchmark_loss.py --source logits --dtype bf16
    python tools/benchmark_loss.py --tensor-parallel 1 2 4 --tokens 1024 2048 --vocab 32000 128256

The methods take turns within each repetition, so that a machine that slows down slows all of them;
the ratios are medians of the ratios to native-unfused in the same repetition. Time is wall time;
cpu-s is the processor time of rank 0, the better figure on a machine that others use. MiB is the
peak above the inputs (and above dW and d_hidden, which every method returns).
Writes DIR/loss.csv and DIR/loss.png with --out DIR.
"""

import argparse
import csv
import gc
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads would count as CPU time
# Freed blocks go back to the system at once: the resident set is then what is in use.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import benchmark_loss_methods as methods

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
BASELINE = "native-unfused"
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


def measure(name, case, options, group, communication) -> dict:
    """One forward and backward of one method on fresh leaves."""
    device, dtype = case["device"], DTYPES[options.dtype]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    tokens, vocab = case["tokens"], case["vocab"] // size
    generator = torch.Generator(device).manual_seed(1)
    labels = torch.randint(case["vocab"], (tokens,), generator=generator, device=device)
    mask = (torch.rand(tokens, generator=generator, device=device) < case["supervised"]).float()
    if options.source == "hidden":
        loss_of = methods.from_hidden(name, options.chunk_size)
        shapes = ((1.0, tokens, options.hidden), (0.05, vocab, options.hidden))
    else:
        loss_of = methods.from_logits(name, options.chunk_size)
        shapes = ((2.0, tokens, vocab),)
    leaves = [
        (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype).requires_grad_()
        for scale, *shape in shapes
    ]
    gc.collect()
    dist.barrier(group)
    communication.take()
    with PeakMemory() as memory:
        cpu, start = time.process_time(), time.perf_counter()
        loss = loss_of(*leaves, labels, mask, group)
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    calls, sent = communication.take()
    returned = sum(x.grad.numel() * x.grad.element_size() for x in leaves)
    if options.source == "logits":  # the gradient of the logits is what a method may save
        returned = 0
    row = {"s": wall, "cpu-s": cpu, "MiB": memory.mib - returned / MIB, "loss": float(loss)}
    return {**row, "collectives": calls, "comm-MiB": sent / MIB, "rank": rank}


def run_rank(rank: int, size: int, directory: str, options) -> None:
    """All cases of one tensor-parallel size; rank 0 leaves them in DIRECTORY/rows.json."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(max(1, options.threads // size))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=size,
    )
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    communication = Communication()
    names = [n for n in options.methods if size == 1 or n not in methods.ONE_RANK]
    rows = []
    for name in names:  # imports and first calls
        tiny = {"vocab": 64 * size, "tokens": 8, "supervised": 1.0, "device": device}
        measure(name, tiny, options, dist.group.WORLD, communication)
    for vocab, tokens, supervised in itertools.product(
        options.vocab, options.tokens, options.supervised
    ):
        case = {"vocab": vocab, "tokens": tokens, "supervised": supervised}
        case["device"] = device
        runs: dict[str, list[dict]] = {name: [] for name in names}
        for repeat in range(options.repeats + cuda):  # a GPU's first turn tunes its kernels
            for i in range(len(names)):
                name = names[(i + repeat) % len(names)]
                runs[name].append(measure(name, case, options, dist.group.WORLD, communication))
        for name in names:
            rows.append(summary(name, case, size, runs[name][cuda:], runs.get(BASELINE, [])[cuda:]))
            if rank == 0:
                print_row(rows[-1])
    if rank == 0:
        Path(directory, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def summary(name: str, case: dict, size: int, runs: list[dict], baseline: list[dict]) -> dict:
    """Medians, spread and ratios of one method's repetitions."""
    row = {"vocab": case["vocab"], "tokens": case["tokens"], "supervised": case["supervised"]}
    row |= {"tp": size, "method": name}
    for key in ("s", "cpu-s", "MiB"):
        row[key] = statistics.median(r[key] for r in runs)
    row["s-min"], row["s-max"] = min(r["s"] for r in runs), max(r["s"] for r in runs)
    for key in ("s", "cpu-s", "MiB"):
        # Megatron's cross entropy of fp32 logits works in their place: no memory to be a share of
        ratios = [
            r[key] / b[key] if key != "MiB" or b[key] > 1 else float("nan")
            for r, b in zip(runs, baseline, strict=False)
        ]
        row[f"{key} ratio"] = statistics.median(ratios) if ratios else float("nan")
    return row | {key: runs[0][key] for key in ("collectives", "comm-MiB", "loss")}


def print_row(row: dict) -> None:
    print(
        f"V={row['vocab']:<7} T={row['tokens']:<5} {row['supervised']:>4.0%} tp={row['tp']} "
        f"{row['method']:<25} {row['s']:7.2f} s [{row['s-min']:.2f}–{row['s-max']:.2f}] "
        f"×{row['s ratio']:.2f}  cpu {row['cpu-s']:6.2f} s ×{row['cpu-s ratio']:.2f}  "
        f"{row['MiB']:7.0f} MiB ×{row['MiB ratio']:.2f}  "
        f"{row['collectives']:3} collectives {row['comm-MiB']:7.2f} MiB  loss {row['loss']:.6f}",
        flush=True,
    )


def linear_fits(rows: list[dict]) -> None:
    """R² of cpu seconds = a + b · supervised tokens · V/tp, where there are 4 sizes or more."""
    import numpy as np

    for name in sorted({r["method"] for r in rows}):
        for tp in sorted({r["tp"] for r in rows}):
            own = [r for r in rows if r["method"] == name and r["tp"] == tp]
            x = np.array([r["tokens"] * r["supervised"] * r["vocab"] / tp for r in own])
            y = np.array([r["cpu-s"] for r in own])
            if len(set(x)) >= 4:
                slope, intercept = np.polyfit(x, y, 1)
                residual = ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum()
                print(
                    f"{name:<25} tp={tp}: {intercept:.2f} s + {slope * 1e9:.2f} ns a supervised "
                    f"token and vocabulary row, R² {1 - residual:.4f}"
                )


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory ratios of each method, a group of bars for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((r["vocab"], r["tokens"], r["supervised"], r["tp"]) for r in rows))
    names = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = plt.subplots(2, 1, figsize=(max(8, 1.6 * len(cases)), 8), sharex=True)
    for axis, key in zip(axes, ("s ratio", "MiB ratio"), strict=True):
        for i, name in enumerate(names):
            own = {
                (r["vocab"], r["tokens"], r["supervised"], r["tp"]): r[key]
                for r in rows
                if r["method"] == name
            }
            places = [j + 0.8 * i / len(names) for j in range(len(cases))]
            axis.bar(places, [own.get(c, 0) for c in cases], 0.8 / len(names), label=name)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_ylabel(f"{key} to {BASELINE}")
    axes[0].legend(fontsize=7)
    axes[1].set_xticks(
        range(len(cases)), [f"V {v}\nT {t}\n{s:.0%} tp{p}" for v, t, s, p in cases], fontsize=7
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--hidden", type=int, default=896, help="hidden size")
    parser.add_argument("--supervised", type=float, nargs="+", default=[1.0, 0.5], help="shares")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--source", choices=("hidden", "logits"), default="hidden")
    parser.add_argument("--chunk-size", type=int, default=352, help="[tokens]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--methods", nargs="+", help="default: all that run here")
    parser.add_argument("--out", type=Path, help="directory of loss.csv and loss.png")
    options = parser.parse_args()
    if options.methods is None:
        options.methods = list(methods.LOGITS_METHODS)
        if options.source == "hidden":
            options.methods += methods.HEAD_METHODS
        if torch.cuda.is_available():
            options.methods += [
                n for n, module in methods.GPU_METHODS.items() if importlib.util.find_spec(module)
            ]
    return options


def main() -> None:
    options = parse()
    rows: list[dict] = []
    for size in options.tensor_parallel:
        with tempfile.TemporaryDirectory() as directory:
            # spawn raises here when a rank dies, also when the system killed it
            torch.multiprocessing.spawn(run_rank, (size, directory, options), size)
            rows += json.loads(Path(directory, "rows.json").read_text())
    linear_fits(rows)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "loss.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, options.out / "loss.png")


if __name__ == "__main__":
    main()
