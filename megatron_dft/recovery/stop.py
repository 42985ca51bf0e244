"""A signal to any one rank stops all ranks at the same step, with one checkpoint.

Megatron's --exit-signal-handler does the agreeing and the saving (an all-gather of the flag after
each step). It hears one signal, from Python code only, so this handler takes its place: it hears
SIGTERM and SIGUSR1, looks for a stop file, and a second signal ends the process at once even where
the main thread is stuck inside a collective.
"""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_dft.compat.hooks import wrap
from megatron_dft.recovery import exit_codes
from megatron_dft.storage import terminal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# scancel reaches torchrun and the worker, and torchrun passes its signal on: one wish, two signals.
REPEAT_SECONDS = 5.0


class StopHandler(DistributedSignalHandler):
    """Stands in for Megatron's global handler.

    `agreed` turns true, on every rank at the same step, when some rank was asked to stop.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        super().__init__(SIGNALS[0])
        self.stop_file = stop_file
        self.agreed = False
        self._heard: float | None = None

    def __enter__(self) -> "StopHandler":
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python's handlers wait for the main thread; the interpreter writes to this pipe at once.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A forked data-loader worker would write its own signals into our pipe.
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        self.original_handlers = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        return self

    def release(self) -> bool:
        """Put the former handlers back."""
        signal.set_wakeup_fd(-1)
        for number, handler in self.original_handlers.items():
            signal.signal(number, handler)
        return True

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if number in SIGNALS:
                    self._hear(signal.Signals(number).name)

    def _hear(self, name: str) -> None:
        now = time.monotonic()
        rank = os.environ.get("RANK", "0")
        if self._heard is None:
            self._heard = now
            terminal.warn(f"rank {rank}: {name}: stopping after this step, with a checkpoint")
        elif now - self._heard > REPEAT_SECONDS:
            terminal.warn(f"rank {rank}: {name} again: exiting now, nothing is saved")
            os._exit(exit_codes.FORCED)

    def signals_received(self) -> list[Any]:
        """Megatron's question after each step: who was asked to stop. Collective."""
        if self.stop_file is not None and os.environ.get("RANK", "0") == "0":
            if self._heard is None and self.stop_file.exists():
                self._heard = time.monotonic()
                terminal.warn(
                    f"{self.stop_file} is there: stopping after this step, with a checkpoint"
                )
        self._signal_received = self._heard is not None
        received = super().signals_received()
        self.agreed = self.agreed or any(received)
        return received


def _forget() -> None:
    signal.set_wakeup_fd(-1)


def install(args: Any, stop_file: str | None) -> StopHandler:
    """Make the handler Megatron's own; `args` are Megatron's, changed in place."""
    handler = StopHandler(Path(stop_file) if stop_file else None)

    def replacing(original: DistributedSignalHandler | None) -> StopHandler:
        if original is not None:
            original.release()
        return handler.__enter__()

    wrap("megatron.training.global_vars:_GLOBAL_SIGNAL_HANDLER", replacing)
    args.exit_signal_handler = True
    return handler
