"""The command of every line of the GPU suite."""

import sys
from pathlib import Path

from tests.gpu.lines import EVERY, SECTIONS
from tests.gpu.plan import Run, command_line
from tests.ranks import free_port


def chosen(runs: list[Run], only: str | None) -> list[Run]:
    """The runs of these names and what they wait for; all of them without names."""
    if only is None:
        return runs
    wanted: set[str] = set()
    waiting = [name for name in only.split(",") if name in EVERY]
    while waiting:
        name = waiting.pop()
        wanted.add(name)
        waiting += EVERY[name].awaited
    return [run for run in runs if run.name in wanted]


def launch_words(run: Run, work: Path) -> list[str]:
    """Arguments of launch.py."""
    more = ["--figures", f"WORK/figures/{run.name}.jsonl"]
    if run.name in {r.name for r in SECTIONS["train"]}:  # timed, one after another
        more = ["--gate", f"WORK/gates/{run.name}"]
    words = [word.replace("WORK", str(work)) for word in (*run.launch, *more)]
    return [*words, "--", *command_line(run, work)]


def command(run: Run, work: Path) -> list[str]:
    """The run's whole command."""
    start = [sys.executable, "-m"]
    if run.program:
        program = [word.replace("WORK", str(work)) for word in run.program]
        return [*start, *program, "--", *command_line(run, work)]
    if run.ranks > 1:
        start += ["torch.distributed.run", f"--nproc-per-node={run.ranks}",
                  f"--master-port={free_port()}", "-m"]  # fmt: skip
    return [*start, "tests.gpu.launch", *launch_words(run, work)]


def heads(out: Path, rehearse: bool) -> list[tuple[str, list[str], str]]:
    """(name, command, why it means nothing without a GPU) of the loss heads' checks."""
    python = sys.executable
    device = ["--device", "cpu"] if rehearse else []
    small = ["--shapes", "512x64", "--tokens", "64", "--repeats", "1"] if rehearse else []
    shares = ["--supervised", "1.0", "0.5", *(small or ["--repeats", "5"])]
    benchmark = [python, "tools/benchmark_loss.py", *shares]
    kernels = "the kernels are Triton's; tests/losses/test_kernels.py has them interpreted"
    return [
        ("self-test", [python, "-m", "tests.gpu.objectives", *device], ""),
        ("every objective", [python, "-m", "tests.gpu.values", *device], ""),
        ("kernels", [python, "-m", "tests.gpu.heads"], kernels),
        ("loss benchmark", [*benchmark, "--out", str(out / "loss")], ""),
    ]
