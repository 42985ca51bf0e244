"""From a command line to Megatron's args, for every program that drives Megatron's loop.

Nothing of Megatron is imported before the device is chosen: the CPU runtime has to be in place
first. So Megatron, and what imports it, is imported inside functions here.
"""

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from megatron_dft.compat import hooks, loopback, release, safe_load, torch_norm, wgrad_fusion
from megatron_dft.cpu import runtime
from megatron_dft.flags.defaults import has_transformer_engine, requested_device, wants_cpu
from megatron_dft.flags.help_page import print_help
from megatron_dft.flags.objective import line as objective_line
from megatron_dft.flags.settings import settings
from megatron_dft.hf.source import open_checkpoint
from megatron_dft.recovery import status
from megatron_dft.recovery.exit_codes import FINISHED, REFUSED
from megatron_dft.storage import terminal
from megatron_dft.storage.safe_pickle import UnsafeFileError
from megatron_dft.training import directories, log_file, waiting


def launch(
    argv: Sequence[str] | None,
    prepare: Callable[[Any], None],
    work: Callable[[Any], None],
    scoring: bool = False,
) -> int:
    """Resolve the flags, `prepare(args)` the data, and do `work(args)`; returns the exit status.

    A user's mistake is one line on standard error (from the first rank of each node) and status 2.

    Args:
        prepare: reads the data, on the first rank of each node, before anything is written; a
            ValueError of it is a user's mistake.
        scoring: whether the command line is that of a scoring run.
    """
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]
    held = contextlib.ExitStack()

    def prepare_and_hold(args: Any) -> None:
        prepare(args)
        if os.environ["RANK"] == "0":
            held.enter_context(directories.owned(args, scoring))

    def get_ready(args: Any) -> None:
        if os.environ["RANK"] == "0" and not scoring:
            terminal.head(f"> {objective_line(sys.argv[1:], settings().objective)}")
        _on_each_node(prepare_and_hold, args)
        log_file.begin(args, scoring)

    if print_help(sys.argv[1:], scoring):
        return FINISHED
    with held:
        return _launch(get_ready, work, scoring)


def _launch(get_ready: Callable[[Any], None], work: Callable[[Any], None], scoring: bool) -> int:
    try:
        args = configure(sys.argv[1:], get_ready, scoring)
    except waiting.OthersRefused:
        return REFUSED
    except (ValueError, AssertionError) as error:
        # Megatron checks its own flags by assertions.
        return _refuse(error)
    try:
        work(args)
    except UnsafeFileError as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    if _is_first_local_rank():
        terminal.fail(f"{one_line(error)}")
    if os.environ.get("RANK", "0") == "0":
        status.record("refused", one_line(error))
    return REFUSED


def configure(
    argv: Sequence[str],
    prepare: Callable[[Any], None],
    scoring: bool = False,
    opener: Callable[..., Any] = open_checkpoint,
    for_gpus: bool = False,
) -> Any:
    """Megatron's args, validated, with ours; set as Megatron's global ones.

    argv: for the device alone; Megatron's parser reads sys.argv. opener: opens --hf-model.
    for_gpus: judge for GPUs although this machine has none; nothing can be trained then.

    Raises ValueError or AssertionError for a user's mistake.
    """
    _default_environment()
    loopback.install()
    release.check_release()
    if for_gpus or wants_cpu(requested_device(argv)):
        runtime.activate()
    else:
        wgrad_fusion.install()
        torch_norm.install(has_transformer_engine())
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_dft.flags import output, recovery, scores
    from megatron_dft.flags.resolve import add_arguments

    hooks.check_release()
    release.skip_built_helpers()
    safe_load.install()
    safe_load.only_torch_dist()
    # Megatron's parse_and_validate_args with one step more: the data is read before
    # set_global_variables opens the first file to write.
    args = parse_args(
        extra_args_provider=functools.partial(
            add_arguments, scoring=scoring, opener=opener, for_gpus=for_gpus
        )
    )
    if scoring:
        scores.leave_out_training(args)
    output.follow_links(args)
    validate_args(args)
    recovery.check(args)
    prepare(args)
    set_global_variables(args)
    return args


def _on_each_node(prepare: Callable[[Any], None], args: Any) -> None:
    """The first rank of each node prepares; all ranks leave when every node is ready."""
    with waiting.met_after():
        if _is_first_local_rank():
            prepare(args)


def _default_environment() -> None:
    """What torchrun sets, for a single process without it; and what Megatron asks for."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        # Two runs of one process each may stand on one machine.
        alone = os.environ["WORLD_SIZE"] == "1"
        os.environ["MASTER_PORT"] = str(loopback.free_port() if alone else 29500)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def one_line(error: Exception) -> str:
    """The message; for an assertion without one, the condition that Megatron asserts."""
    if str(error):
        return terminal.visible(" ".join(str(error).split()))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron requires: {frame.line} ({frame.filename}:{frame.lineno})"


def _is_first_local_rank() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
