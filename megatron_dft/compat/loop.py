"""Hooks on Megatron's training loop: one function a place, each called with what stands there."""

import inspect
from collections.abc import Callable
from typing import Any

from megatron_dft.compat.hooks import wrap


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

    wrap("megatron.training.training:training_log", make)


def after_training_step(callback: Callable[[list[Any], int], None]) -> None:
    """Call `callback(model_chunks, iteration)` after each optimizer step, before checkpoints."""

    def make(original):
        def post_training_step_callbacks(model, optimizer, scheduler, iteration, *args, **kwargs):
            result = original(model, optimizer, scheduler, iteration, *args, **kwargs)
            callback(model, iteration)
            return result

        return post_training_step_callbacks

    wrap("megatron.training.training:post_training_step_callbacks", make)


def on_evaluation(
    is_due: Callable[[int], bool], after: Callable[[dict[str, Any], int], None]
) -> None:
    """Ask `is_due(iteration)` before an evaluation, on every rank, and call `after(figures,
    iteration)` behind it, on ranks of the last pipeline stage.

    `figures` (name → mean, a tensor each) may be changed: Megatron logs what is left.
    """
    step = [0]

    def asking(original):
        signature = inspect.signature(original)

        def evaluate_and_print_results(*args, **kwargs):
            step[0] = signature.bind(*args, **kwargs).arguments["iteration"]
            if is_due(step[0]):
                original(*args, **kwargs)

        return evaluate_and_print_results

    def hearing(original):
        def evaluate(*args, **kwargs):
            found, *rest = original(*args, **kwargs)
            if found:
                after(found, step[0])
            return found, *rest

        return evaluate

    wrap("megatron.training.training:evaluate_and_print_results", asking)
    wrap("megatron.training.training:evaluate", hearing)


def on_optimizer_built(callback: Callable[[Any], None]) -> None:
    """Call `callback(optimizer)` when Megatron's optimizer has copied the model's weights."""

    def make(original):
        def get_megatron_optimizer(*args, **kwargs):
            optimizer = original(*args, **kwargs)
            callback(optimizer)
            return optimizer

        return get_megatron_optimizer

    wrap("megatron.training.training:get_megatron_optimizer", make)


def on_checkpoint_args(callback: Callable[[Any], None]) -> None:
    """Call `callback(args)` with the args that a checkpoint was saved with, when it is resumed.

    On every rank, after the model and the optimizer are built; not under --finetune.
    """

    def make(original):
        def check_checkpoint_args(checkpoint_args, *args, **kwargs):
            original(checkpoint_args, *args, **kwargs)
            callback(checkpoint_args)

        return check_checkpoint_args

    wrap("megatron.training.checkpointing:check_checkpoint_args", make)


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

    wrap("megatron.core.models.gpt.gpt_model:process_mtp_loss", make)


def sync_parameters(model: list[Any], args: Any) -> None:
    """Finish the distributed optimizer's overlapped parameter gather: weights will be read."""
    from megatron.training import training

    if training.should_disable_forward_pre_hook(args):
        training.force_param_sync(model)
