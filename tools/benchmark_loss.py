"""Time, peak memory and communication of DFT losses, side by side in one run.

    python tools/benchmark_loss.py                          # from hidden states
    python tools/benchmark_loss.py --source logits --dtype bf16
    python tools/benchmark_loss.py --tensor-parallel 1 2 4 --tokens 1024 2048 --shapes 32000x896

Default shapes: one on a CPU, three on a GPU (--shapes).
The methods take turns within each repetition, so that a machine that slows down slows all of them;
ratios are medians of the ratios to native-unfused in the same repetition, and on a GPU to
Transformer Engine and to three bare products too. Methods whose package is missing are left out.
Time is wall time; cpu-s is the processor time of rank 0, the better figure on a machine that others
use. MiB is the peak above the inputs (and above dW and d_hidden, which every method returns).
TFLOPS counts the three products of the supervised rows, TB/s the bytes that a logit needs.
Writes DIR/loss-SOURCE.csv and .png with --out DIR.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
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
import benchmark_loss_report as report
from benchmark_loss_measure import DTYPES, Communication, Inputs, measure

# A 1.5B and an 8B model, and a tensor-parallel rank's shard of a 70B.
GPU_SHAPES = ["131072x1536", "131072x4096", "16384x8192"]
COMPARED = {"transformer-engine": "TE", "three-products": "3 products"}


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
    tiny = {"vocab": 128 * size, "rows": 128, "tokens": 8, "supervised": 1.0, "hidden": 64}
    tiny_inputs = Inputs({**tiny, "device": device}, options.source, options.dtype)
    for name in list(names):  # imports and first calls
        try:
            measure(name, tiny_inputs, options, dist.group.WORLD, communication)
        except methods.OPTIONAL_FAILURES as error:
            if name not in methods.PEERS:
                raise
            print(f"{name}: left out, {type(error).__name__}: {str(error)[:200]}", flush=True)
            names.remove(name)
    rows = []
    for (vocab, hidden), tokens, supervised in itertools.product(
        options.shapes, options.tokens, options.supervised
    ):
        case = {"vocab": vocab, "rows": vocab // size, "tokens": tokens, "supervised": supervised}
        case |= {"hidden": hidden if options.source == "hidden" else 0, "device": device}
        case["itemsize"] = DTYPES[options.dtype].itemsize
        for row in run_case(case, names, size, options, communication, cuda):
            rows.append(row)
            if rank == 0:
                report.print_row(row, cuda)
    if rank == 0:
        Path(directory, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def run_case(case, names, size, options, communication, cuda) -> list[dict]:
    """Every method's turns at one size; a GPU's first turn tunes its kernels and is not counted."""
    inputs = Inputs(case, options.source, options.dtype)
    runs: dict[str, list[dict]] = {name: [] for name in names}
    exact = None
    for repeat in range(options.repeats + 1):
        for i in range(len(names)):
            name = names[(i + max(repeat - 1, 0)) % len(names)]
            if repeat == 0 and not cuda and name != methods.BASELINE:
                continue
            compared = exact if repeat <= 1 and name != "three-products" else None
            run = measure(name, inputs, options, dist.group.WORLD, communication, compared)
            exact = run.pop("exact", exact)
            runs[name].append(run)
        if repeat == 1:
            exact = None  # compared once; the memory is wanted
    if not cuda and methods.BASELINE in runs:
        runs[methods.BASELINE].pop(0)
    others = {methods.BASELINE: runs.get(methods.BASELINE, [])}
    others |= {label: runs[name] for name, label in COMPARED.items() if name in runs}
    counted = {label: own[cuda:] for label, own in others.items()}
    return [report.summary(name, case, size, runs[name][cuda:], counted) for name in names]


def shape(text: str) -> tuple[int, int]:
    vocab, _, hidden = text.partition("x")
    return int(vocab), int(hidden)


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        default=[shape(s) for s in (GPU_SHAPES if cuda else ["151936x896"])],
        help="vocabulary x hidden size (the latter unused with --source logits)",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192 if cuda else 4096])
    shares = [1.0, 0.5, 0.2] if cuda else [1.0, 0.5]
    parser.add_argument("--supervised", type=float, nargs="+", default=shares, help="shares")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--source", choices=("hidden", "logits"), default="hidden")
    parser.add_argument("--chunk-size", type=int, default=352, help="[tokens], off a GPU")
    parser.add_argument("--repeats", type=int, default=7 if cuda else 3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--methods", nargs="+", help="default: all that run here")
    parser.add_argument("--out", type=Path, help="directory of the CSV and the PNG")
    options = parser.parse_args()
    if options.source == "logits":  # the hidden size does not matter
        options.shapes = list(dict.fromkeys((vocab, 0) for vocab, _ in options.shapes))
    if options.methods is None:
        options.methods = methods.available(options.source, cuda)
    return options


def main() -> None:
    options = parse()
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}")
    rows: list[dict] = []
    for size in options.tensor_parallel:
        with tempfile.TemporaryDirectory() as directory:
            # spawn raises here when a rank dies, also when the system killed it
            torch.multiprocessing.spawn(run_rank, (size, directory, options), size)
            rows += json.loads(Path(directory, "rows.json").read_text())
    report.linear_fits(rows)
    if options.out:
        report.write(rows, options.out, f"loss-{options.source}")


if __name__ == "__main__":
    main()
