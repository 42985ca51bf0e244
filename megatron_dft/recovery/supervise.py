"""One context manager round the training: stopping, commits, resuming, and the word at the end."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dft.compat import optimizer_resume
from megatron_dft.compat.hooks import wrap
from megatron_dft.recovery import (
    commit,
    exit_codes,
    fallback,
    manifest,
    numbers,
    optimizer_state,
    resume,
    schedule,
    status,
    stop,
)
from megatron_dft.recovery.watchdog import Watchdog
from megatron_dft.storage import terminal
from megatron_dft.storage.safe_pickle import UnsafeFileError


class _Run:
    """What has happened so far in this process."""

    def __init__(self, args: Any, identity: dict[str, Any]) -> None:
        self.args, self.identity = args, identity
        self.watchdog = Watchdog(args.hang_timeout) if args.hang_timeout else None
        self.iteration = 0
        self.chosen: int | None = None  # the step to load

    def progress(self, section: str) -> None:
        if self.watchdog is not None:
            self.watchdog.progress(section)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's manifest says about the run."""
        args = self.args
        return {
            "identity": self.identity,
            "iteration": args.curr_iteration + 1 if hasattr(args, "curr_iteration") else None,
            "consumed_train_samples": args.consumed_train_samples,
            "global_batch_size": args.global_batch_size,
            "world_size": args.world_size,
            "tensor_model_parallel_size": args.tensor_model_parallel_size,
            "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
            "context_parallel_size": args.context_parallel_size,
        }

    def before_model(self, failed: dict[int, str] | None = None) -> None:
        """Choose the checkpoint; on every rank, when the process groups exist.

        failed: steps that were chosen and did not load.
        """
        args = self.args
        if args.load is None:
            return
        root = Path(args.load)
        choice = self._choose(root, failed)
        for line in choice.damaged:
            _say(f"warning: {root}: {line}; passed over")
        if choice.iteration is None:
            _say(f"{root}: no checkpoint yet; starting from the model's own weights")
            return
        if choice.run is not None and not args.finetune:
            where = f"{root} (step {choice.iteration})"
            for line in resume.check_same_run(
                choice.run["identity"], self.identity, args.allow_change, where
            ):
                _say(f"warning: {line}")
        self._compare_optimizer(root, choice.iteration)
        self.chosen = choice.iteration
        if choice.iteration >= 0 and args.ckpt_step is None:
            resume.mend_tracker(root, choice.iteration)
            _say(f"{root}: going on from step {choice.iteration}")

    def _choose(self, root: Path, failed: dict[int, str] | None) -> resume.Choice:
        args = self.args
        if args.ckpt_step is None:
            return resume.choose(root, args.strict_resume, failed)
        faults, content = resume._faults(manifest.iteration_directory(root, args.ckpt_step))
        if faults:
            raise resume.ResumeError(
                f"--ckpt-step {args.ckpt_step}: expected a whole checkpoint, got "
                f"{'; '.join(faults)}; choose another step"
            )
        return resume.Choice(args.ckpt_step, [], content and content["run"])

    def _compare_optimizer(self, root: Path, iteration: int) -> None:
        args = self.args
        if iteration < 0 or args.finetune or args.skip_train:
            return
        if args.no_load_optim:
            _say("--no-load-optim: the optimizer and its learning rates start from the beginning")
            return
        saved: dict[str, dict[str, Any]] = {}
        if dist.get_rank() == 0:
            # What cannot be read will not load either, and fallback.py says why.
            with contextlib.suppress(UnsafeFileError):
                saved = optimizer_state.read(manifest.iteration_directory(root, iteration))
        saved = resume._broadcast(saved)
        where, before = f"{root} (step {iteration})", saved.get("args", {})
        optimizer_state.check(args, before, where)
        scheduler = saved.get("scheduler", {})
        for line in schedule.settle(args, scheduler, where, before.get(optimizer_state.BATCH)):
            _say(f"resuming with another schedule: {line}")


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        terminal.say(f"> {text}")


def _last_words(run: _Run) -> str:
    """The step that was reached, and what is left of it."""
    args = run.args
    reached = max(run.iteration, args.iteration)  # a resumed run may have had no step left
    done = f"step {reached} of {args.train_iters}"
    if args.skip_train:
        return "no step was taken (--skip-train)"
    if reached >= args.train_iters:
        return f"{done}; checkpoint in {args.save}" if args.save is not None else done
    if args.save is None:
        return f"{done}; nothing is saved, there is no --save"
    return f"{done}; checkpoint in {args.save}, from which --load goes on"


def _all_done(args: Any) -> bool:
    """Whether the run died after its last checkpoint, in the exports: there is no row left then,
    which Megatron's sampler takes for an error, time and again."""
    return bool(args.train_iters) and args.iteration >= args.train_iters


def _install(run: _Run) -> stop.StopHandler:
    args = run.args
    handler = stop.install(args, args.stop_file)
    numbers.install(args)
    optimizer_resume.install()
    if args.save is not None:
        commit.install(run.describe, args.keep_last)

    def choosing(original):
        def setup_model_and_optimizer(*positional, **named):
            run.before_model()
            built = original(*positional, **named)
            if _all_done(args):
                _say(f"step {args.iteration} was the last one: only what follows it is done again")
                args.eval_iters, args.full_validation = 0, False
            return built

        return setup_model_and_optimizer

    def loading(original):
        def build_pretraining_data_loader(dataset, consumed_samples):
            # Without rows Megatron does not train, so it does not save the last step again either.
            return None if _all_done(args) else original(dataset, consumed_samples)

        return build_pretraining_data_loader

    def deciding(original):
        def checkpoint_and_decide_exit(model, optimizer, scheduler, iteration, *rest, **named):
            run.iteration = iteration
            run.progress(f"the save after step {iteration}")
            leaving = original(model, optimizer, scheduler, iteration, *rest, **named)
            run.progress(f"step {iteration + 1}")
            return leaving

        return checkpoint_and_decide_exit

    fallback.install(run)
    wrap("megatron.training.training:setup_model_and_optimizer", choosing)
    wrap("megatron.training.training:build_pretraining_data_loader", loading)
    wrap("megatron.training.training:checkpoint_and_decide_exit", deciding)
    return handler


@contextlib.contextmanager
def supervised(args: Any, identity: dict[str, Any]) -> Iterator[None]:
    """Run Megatron's `pretrain` and what follows it in here.

    Args:
        args: Megatron's, validated and with our flags; changed in place.
        identity: loss, model, tokenizer of this run, JSON values; a resume compares them.

    Raises:
        SystemExit: with a status of exit_codes.py where the run ended before its last step.
    """
    run = _Run(args, identity)
    handler = _install(run)
    if run.watchdog is not None:
        run.watchdog.start()
    rank = os.environ.get("RANK", "0")
    try:
        yield
        # Every rank has written what it had to write: only now is the run a success.
        dist.barrier()
        if rank == "0":
            status.record("finished", args.train_iters)
            terminal.say(f"> finished: {_last_words(run)}")
    except (resume.ResumeError, UnsafeFileError) as error:
        if rank == "0":
            terminal.fail(f"{error}")
            status.record("refused", str(error))
        dist.barrier()
        raise SystemExit(exit_codes.REFUSED) from None
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            raise
        # Before any process is gone: the launcher may kill the others on the first one's exit.
        dist.barrier()
        if rank == "0":
            status.record("stopped", run.iteration)
            why = "as asked" if handler.agreed else "by a flag of the run's"
            terminal.say(f"> stopped {why}: {_last_words(run)}")
        dist.barrier()
        if handler.agreed:
            raise SystemExit(exit_codes.STOPPED) from None
        raise
    except Exception as error:
        step = run.iteration + 1
        terminal.fail(f"rank {rank}, in or before step {step}: {type(error).__name__}: {error}")
        raise
    finally:
        if run.watchdog is not None:
            run.watchdog.stop()
