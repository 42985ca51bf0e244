"""DFT's step time over SFT's, in one training run: the objective changes every step.

    python tools/step_time.py --steps 30 -- --hf-model DIR --train-data FILE --seq-length 128 …

What follows `--` are the flags of megatron_dft.train (without --loss and --train-iters). Under
torchrun it measures any layout. Prints the medians and their ratio; the first two steps of each
objective warm up and do not count.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from typing import Any

WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each objective")
    parser.add_argument("train", nargs="+", help="flags of megatron_dft.train, after --")
    args = parser.parse_args()

    from megatron_dft import train
    from megatron_dft.compat import loop
    from megatron_dft.flags.settings import set_settings, settings
    from megatron_dft.losses import registry

    objectives = [registry.get("sft"), registry.get("dft")]
    seconds: dict[str, list[float]] = {"sft": [], "dft": []}
    mark = time.perf_counter()

    def swap(chunks: list[Any], iteration: int) -> None:
        nonlocal mark
        now = time.perf_counter()
        seconds[settings().objective.name].append(now - mark)
        set_settings(dataclasses.replace(settings(), objective=objectives[iteration % 2]))
        mark = time.perf_counter()

    install = loop.after_training_step
    # The run's own hook (exports) is not needed here; ours takes its place.
    loop.after_training_step = lambda callback: install(swap)
    steps = 2 * (args.steps + WARM_UP)
    status = train.main([*args.train, "--loss", "sft", "--train-iters", str(steps)])
    if status:
        return status
    medians = {}
    for name, times in seconds.items():
        kept = times[WARM_UP:]
        medians[name] = statistics.median(kept)
        low, _, high = statistics.quantiles(kept, n=4)
        print(
            f"{name}: median {medians[name] * 1e3:.1f} ms, quartiles {low * 1e3:.1f} to "
            f"{high * 1e3:.1f} ms, {len(kept)} steps"
        )
    print(f"dft / sft: {medians['dft'] / medians['sft']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
