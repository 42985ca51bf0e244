"""Fine-tune a Hugging Face model on Megatron's own training loop.

    megatron-dft train --nproc-per-node 8 --hf-model DIR --loss dft --train-data x …
    torchrun --nnodes 2 --nproc-per-node 8 … -m megatron_dft.train --hf-model DIR …

Every Megatron flag works; ours are in flags/, one file a subject.
"""

import time

_PROGRAM_START = time.time()

from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

from megatron_dft.storage import terminal  # noqa: E402

if __name__ == "__main__":  # before the imports that warn
    terminal.divert()

from megatron_dft.training.launch import launch  # noqa: E402
from megatron_dft.training.log_file import run_program  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training that the flags describe; returns the exit status, 2 for a user's mistake."""
    return launch(argv, _prepare, _train)


def _prepare(args: Any) -> None:
    from megatron_dft.training import data_provider

    data_provider.prepare(args)


def _train(args: Any) -> None:
    # Not earlier: importing Megatron has to find the device chosen.
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_dft.compat import checkpointing
    from megatron_dft.flags.settings import settings
    from megatron_dft.recovery.supervise import supervised
    from megatron_dft.step.forward_step import forward_step
    from megatron_dft.training import agreement, data_provider, machine, model, output
    from megatron_dft.training.data_provider import datasets_provider
    from megatron_dft.training.evaluation import Evaluation
    from megatron_dft.training.identity import run_identity

    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    checkpointing.fail_on_silent_exits()
    if not args.async_save:
        checkpointing.collect_write_results_here()
    machine.report(args)
    handle = model.ModelHandle(args)
    config = model.model_config(args, handle)
    data_provider.settle(args)
    Evaluation(args, settings().whole_evaluation).install()
    out = output.Output(args, handle)
    out.install()
    with supervised(args, run_identity()):
        agreement.install()
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )
        out.finish()


if __name__ == "__main__":
    run_program(main)
