"""`megatron_dft.train`, heard and with faults: the jobs of the virtual cluster run it in its place.

$FAULTS holds words LEG:STEP:RANK:FAULT; the fault comes in the middle of that step of the job's
leg: kill (SIGKILL to itself), freeze (SIGSTOP to itself), hold (wait until asked to stop).
"""

import json
import os
import signal
import sys
import time

from megatron_dft import train
from tests.train import listener


def _say(text: str) -> None:
    # One write: what ranks print at the same time would mix otherwise.
    os.write(1, f"{text}\n".encode())


def _hold() -> None:
    from megatron.training import global_vars

    handler = global_vars._GLOBAL_SIGNAL_HANDLER
    while handler._heard is None and not handler.stop_file.exists():
        time.sleep(0.05)


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hold": _hold,
}


def _install() -> None:
    rank, leg = os.environ["RANK"], os.environ.get("SLURM_RESTART_COUNT", "0")
    words = [word.split(":") for word in os.environ.get("FAULTS", "").split()]
    mine = {int(word[1]): word[3] for word in words if (word[0], word[2]) == (leg, rank)}

    def rows(step: int, numbers: list[int]) -> None:
        _say(f"ROWS {json.dumps([int(rank), step, numbers])} .")
        if step in mine:
            fault = mine.pop(step)
            _say(f"FAULT {fault} in step {step} on rank {rank} of leg {leg}")
            FAULTS[fault]()

    listener.on_rows(rows)
    listener.on_figures(lambda figures: _say(f"FIGURES {json.dumps(figures)} ."))


if __name__ == "__main__":
    plain = train._train

    def _train(args):
        # Not earlier: importing Megatron has to find the CPU runtime in place.
        _install()
        plain(args)

    train._train = _train
    sys.exit(train.main())
