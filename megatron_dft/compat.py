"""The one module that knows Megatron's releases and works round what they get wrong.

Each work-round names its reason, is applied once, and fails loudly where the symbol it needs is
gone. Tested with megatron-core 0.19.2.
"""

import argparse
import importlib
import inspect
import queue
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from megatron_dft.cluster.hooks import wrap


def check_release() -> str:
    """The installed megatron-core release; ValueError if it is not one that this package drives."""
    release = version("megatron-core")
    major, minor = (int(part) for part in release.split(".")[:2])
    if not (0, 19) <= (major, minor) < (0, 21):
        raise ValueError(
            f"megatron-core: expected >= 0.19, < 0.21, got {release}; "
            "pip install 'megatron-core[training]>=0.19,<0.21', or use patches/ for older releases"
        )
    return release


def mend_help(parser: argparse.ArgumentParser) -> None:
    """Let --help print: 0.19 has a bare % in the help of --moe-paged-stash-buffer-size-factor-cuda.

    argparse formats a help text with %, and fails on the whole page for one that cannot be.
    """
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        if not action.help:
            continue
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


_originals: dict[tuple[str, str], Callable] = {}


def _replace(module_name: str, name: str, make: Callable[[Callable], Callable]) -> None:
    """Wrap a function of a module; a second wrapping takes the first one's place."""
    module = importlib.import_module(module_name)
    key = (module_name, name)
    if key in _originals:
        setattr(module, name, _originals[key])
    original = getattr(module, name, None)
    wrap(module, name, make)
    _originals[key] = original


def on_training_log(before: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Call `before(loss_dict, arguments)` ahead of each of Megatron's log calls.

    `loss_dict` (name → mean of this step, last pipeline stage only) may be changed: Megatron logs
    what is left. `arguments` are those of training_log by name.
    """

    def make(original):
        signature = inspect.signature(original)

        def training_log(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            before(bound.arguments["loss_dict"], bound.arguments)
            return original(*bound.args, **bound.kwargs)

        return training_log

    _replace("megatron.training.training", "training_log", make)


def after_training_step(callback: Callable[[list[Any], int], None]) -> None:
    """Call `callback(model_chunks, iteration)` after each optimizer step, before checkpoints."""

    def make(original):
        def post_training_step_callbacks(model, optimizer, scheduler, iteration, *args, **kwargs):
            result = original(model, optimizer, scheduler, iteration, *args, **kwargs)
            callback(model, iteration)
            return result

        return post_training_step_callbacks

    _replace("megatron.training.training", "post_training_step_callbacks", make)


def on_optimizer_built(callback: Callable[[Any], None]) -> None:
    """Call `callback(optimizer)` when Megatron's optimizer has copied the model's weights."""

    def make(original):
        def get_megatron_optimizer(*args, **kwargs):
            optimizer = original(*args, **kwargs)
            callback(optimizer)
            return optimizer

        return get_megatron_optimizer

    _replace("megatron.training.training", "get_megatron_optimizer", make)


def on_checkpoint_args(callback: Callable[[Any], None]) -> None:
    """Call `callback(args)` with the args that a checkpoint was saved with, when it is resumed.

    On every rank, after the model and the optimizer are built; not under --finetune.
    """

    def make(original):
        def check_checkpoint_args(checkpoint_args, *args, **kwargs):
            original(checkpoint_args, *args, **kwargs)
            callback(checkpoint_args)

        return check_checkpoint_args

    _replace("megatron.training.checkpointing", "check_checkpoint_args", make)


def separate_mtp_losses() -> None:
    """Let a model's loss function have a version of its own for multi-token prediction heads.

    Megatron computes their losses by the main head's `compute_language_model_loss`; where that has
    an attribute `for_mtp`, they take it instead.
    """

    def make(original):
        def process_mtp_loss(*args, **kwargs):
            loss = kwargs["compute_language_model_loss"]
            kwargs["compute_language_model_loss"] = getattr(loss, "for_mtp", loss)
            return original(*args, **kwargs)

        return process_mtp_loss

    _replace("megatron.core.models.gpt.gpt_model", "process_mtp_loss", make)


def sync_parameters(model: list[Any], args: Any) -> None:
    """Finish the distributed optimizer's overlapped parameter gather: weights will be read."""
    from megatron.training import training

    if training.should_disable_forward_pre_hook(args):
        training.force_param_sync(model)


def checkpoint_exists(directory: str | None) -> bool:
    """Whether Megatron would find a checkpoint to load there."""
    from megatron.training.checkpointing import checkpoint_exists as exists

    return directory is not None and exists(directory)


def fail_on_silent_exits() -> None:
    """Megatron's checkpoint code calls sys.exit() with status 0 where loading failed.

    A scheduler would take that for success. Inside that module a bare exit becomes status 1.
    """
    import megatron.training.checkpointing as checkpointing

    class _Sys:
        def __getattr__(self, name):
            return getattr(sys, name)

        @staticmethod
        def exit(status=None):
            sys.exit(status or 1)

    checkpointing.sys = _Sys()


def collect_write_results_here() -> None:
    """For runs without --async-save: a save's results stay in the process whose threads wrote it.

    Megatron passes them through a helper process, which is needed only where another process
    writes. Each rank's helper imports torch and Megatron again at the first save: 4 s of a core
    and half a gigabyte, kept to the end of the run.
    """
    results: queue.Queue = queue.Queue()

    def make(original):
        def get_write_results_queue(*args, **kwargs):
            return results

        return get_write_results_queue

    module = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    _replace(module, "get_write_results_queue", make)
