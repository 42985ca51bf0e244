"""Fine-tune a Hugging Face model on Megatron's own training loop.

    torchrun --nproc-per-node 8 -m megatron_dft.train --hf-model DIR --loss dft --train-data x …

Every Megatron flag works; arguments.py lists ours.
"""

import time

_PROGRAM_START = time.time()

import functools  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from typing import Any  # noqa: E402

from megatron_dft.cluster import status  # noqa: E402

CONFIGURATION_ERROR = 2


def _requested_device(argv: Sequence[str]) -> str:
    """--device, before Megatron's parser exists: its import must find the runtime in place."""
    chosen = "auto"
    for index, word in enumerate(argv):
        if word == "--device" and index + 1 < len(argv):
            chosen = argv[index + 1]
        elif word.startswith("--device="):
            chosen = word.split("=", 1)[1]
    return chosen


def _is_first_local_rank() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training that the flags describe; returns the exit status.

    A user's mistake is one line on standard error (from the first rank of each node) and status 2.
    """
    return launch(argv, _train)


def launch(argv: Sequence[str] | None, work: Callable[[Any], None], scoring: bool = False) -> int:
    """Resolve the flags and do `work(args)`: what training and scoring (score.py) share."""
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]
    try:
        args = _configure(sys.argv[1:], scoring)
    except (ValueError, AssertionError) as error:
        # Megatron checks its own flags by assertions.
        if _is_first_local_rank():
            print(f"{socket.gethostname()}: error: {_one_line(error)}", file=sys.stderr, flush=True)
        if os.environ.get("RANK", "0") == "0":
            status.record("refused", _one_line(error))
        return CONFIGURATION_ERROR
    work(args)
    return 0


def _one_line(error: Exception) -> str:
    """The message; for an assertion without one, the condition that Megatron asserts."""
    if str(error):
        return " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron requires: {frame.line} ({frame.filename}:{frame.lineno})"


def _configure(argv: Sequence[str], scoring: bool) -> Any:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from megatron_dft import compat
    from megatron_dft.arguments import add_arguments, wants_cpu

    release = compat.check_release()
    if wants_cpu(_requested_device(argv)):
        from megatron_dft.cpu import runtime

        runtime.activate()
        if os.environ["RANK"] == "0":
            print(
                f"megatron_dft: running on the CPU over gloo (megatron-core {release})", flush=True
            )
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_dft import data_provider
    from megatron_dft.cluster import flags as recovery_flags

    # Megatron's parse_and_validate_args with one step more: the data is read before
    # set_global_variables opens the first file to write.
    add = functools.partial(add_arguments, scoring=scoring)
    args = parse_args(extra_args_provider=recovery_flags.before(add))
    if scoring:
        from megatron_dft import score, score_checks

        score_checks.leave_out_training(args)
    validate_args(args)
    recovery_flags.check(args)
    if _is_first_local_rank():
        if scoring:
            score.prepare(args)
        else:
            data_provider.prepare(args)
    set_global_variables(args)
    return args


def _train(args: Any) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_dft import compat, model, output
    from megatron_dft.cluster.recovery import supervised
    from megatron_dft.data_provider import datasets_provider
    from megatron_dft.forward_step import forward_step
    from megatron_dft.run_identity import run_identity

    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    compat.fail_on_silent_exits()
    if not args.async_save:
        compat.collect_write_results_here()
    handle = model.ModelHandle(args)
    config = model.model_config(args, handle)
    out = output.Output(args, handle)
    out.install()
    with supervised(args, run_identity()):
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )
        out.finish()


if __name__ == "__main__":
    sys.exit(main())
