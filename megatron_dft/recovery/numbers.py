"""NaN or inf in a loss or a gradient: no update, and every rank stops at that step.

Megatron hands each loss and each gradient bucket to its rerun state machine, which lets the first
iteration pass unchecked and after that repeats the step, saves, and asks for a restart on another
node. Here a bad number is noted, all ranks agree before the optimizer's step, and the run ends with
a status of its own. --rerun-mode report_stats keeps Megatron's machine as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_dft.compat.hooks import wrap
from megatron_dft.recovery import exit_codes, status
from megatron_dft.storage import terminal


def samples_of_rank(
    consumed: int, global_batch: int, micro_batch: int, replica: int, replicas: int
) -> list[int]:
    """Numbers of the samples that a data-parallel replica reads in one step.

    Megatron's sampler deals the global batch out in micro-batches, round robin over replicas
    (training/datasets/data_samplers.py, MegatronPretrainingSampler).
    """
    stride = micro_batch * replicas
    return [
        consumed + start + replica * micro_batch + i
        for start in range(0, global_batch, stride)
        for i in range(micro_batch)
    ]


class NumberCheck:
    """What this rank found in the present step."""

    def __init__(self, args: Any) -> None:
        self.args, self.found = args, ""
        self._verdicts: list[tuple[torch.Tensor, str]] = []

    def note(self, result: Any, rejected: Callable[[Any], Any], message: str) -> None:
        """Remember a result's verdict; it stays on the device until `agree` reads it."""
        # Not "cuda": inside a recomputed layer's backward the CPU runtime hears of no placement.
        device = torch.cuda.current_device()
        verdict = torch.as_tensor(rejected(result), device=device).any()
        # Without a synchronisation: reading it here would wait for every micro-batch's forward.
        self._verdicts.append((verdict, message.strip() or f"unexpected result {result}"))

    def agree(self) -> bool:
        """Whether any rank found something in this step; collective, once a step."""
        verdicts, self._verdicts = self._verdicts, []
        flag = torch.zeros(1, dtype=torch.int32, device="cuda")
        if verdicts:
            flag += torch.stack([verdict for verdict, _ in verdicts]).any()
        own = flag.clone()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        bad = bool(flag.item())
        if bad:
            if own.item():
                self.found = next(text for verdict, text in verdicts if verdict.item())
            self._report()
        return bad

    def _report(self) -> None:
        from megatron.core import mpu

        args = self.args
        step = args.curr_iteration + 1
        if self.found:
            samples = samples_of_rank(
                args.consumed_train_samples,
                args.global_batch_size,
                args.micro_batch_size,
                mpu.get_data_parallel_rank(),
                mpu.get_data_parallel_world_size(),
            )
            terminal.fail(
                f"rank {dist.get_rank()}, step {step}: "
                f"{self.found}; samples {samples} (in the order of training); no weight was "
                "changed. Look at the rows, lower --lr, or train in fp32"
            )
        if dist.get_rank() == 0:
            status.record("bad-numbers", step)
        dist.barrier()


def install(args: Any) -> None:
    """Take the place of the rerun machine's verdict; `args` are Megatron's."""
    from megatron.core.rerun_state_machine import RerunMode

    check = NumberCheck(args)

    def replaces(machine: Any) -> bool:
        return args.check_for_nan_in_loss_and_grad and (
            machine.mode is not RerunMode.REPORT_DETERMINISM_STATS
        )

    def validate(original):
        def validate_result(self, result, rejection_func, message, *rest, fatal=True, **kwargs):
            if not (fatal and replaces(self)):
                return original(self, result, rejection_func, message, *rest, fatal=fatal, **kwargs)
            check.note(result, rejection_func, message)

        return validate_result

    def decide(original):
        def should_checkpoint_and_exit(self):
            if replaces(self) and check.agree():
                return False, True, exit_codes.BAD_NUMBERS
            return original(self)

        return should_checkpoint_and_exit

    owner = "megatron.core.rerun_state_machine:RerunStateMachine"
    wrap(f"{owner}.validate_result", validate)
    wrap(f"{owner}.should_checkpoint_and_exit", decide)
