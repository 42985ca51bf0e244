"""The data sets of a run, in the form that Megatron's loop asks for them."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from megatron.training import get_args

from megatron_dft.data import repeats, shared_rows
from megatron_dft.data.dataset import ChatDataset, build_dataset, check_rows
from megatron_dft.data.fingerprint import check_resume, record
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.spec import RowKind
from megatron_dft.data.tokenizer import load_tokenizer
from megatron_dft.flags import evaluation, schedule
from megatron_dft.flags.data import cache_directory, dataset_options
from megatron_dft.flags.settings import settings
from megatron_dft.recovery.resume import ResumeError
from megatron_dft.step.loss import SOURCES, VALID_SOURCES
from megatron_dft.storage import terminal
from megatron_dft.training import agreement, trained_chat


def build(
    args: Any, flag: str, num_samples: int | None, shuffle: bool, progress: bool = False
) -> ChatDataset:
    """The data set of --train-data, --valid-data or --valid-share (`flag`)."""
    options = _options(args, flag, shuffle)
    options = dataclasses.replace(options, num_samples=num_samples, progress=progress)
    return build_dataset(_items(args, flag), _tokenizer(args), options)


def _items(args: Any, flag: str) -> Any:
    return args.valid_data if flag == "--valid-data" else args.train_data


def _tokenizer(args: Any) -> Any:
    checkpoint = settings().checkpoint
    assert checkpoint is not None
    return load_tokenizer(
        checkpoint.path, args.chat_template, trust_remote_code=args.trust_remote_code
    )


def _options(args: Any, flag: str, shuffle: bool) -> DatasetOptions:
    context = args.context_parallel_size
    options = dataset_options(args) | {"cache_dir": cache_directory(args)}
    return DatasetOptions(
        seq_length=args.seq_length,
        seed=args.seed,
        pad_multiple=2 * context if context > 1 else 1,
        shuffle=shuffle,
        batch_multiple=1 if shuffle else args.eval_global_batch_size,
        flag=flag,
        reference_scores=settings().reference_scores if flag == "--train-data" else None,
        vocab_size=settings().vocab_size,
        held_out_part=flag == "--valid-share",
        **(options | _of_validation(flag, shuffle)),
    )


def check_first_rows(args: Any, rows: int) -> None:
    """What `prepare` refuses of the first `rows` rows of each item; nothing is cached."""
    flags = ["--train-data"] if args.train_data and not args.skip_train else []
    flags += ["--valid-data"] if args.valid_data else []
    for flag in flags:
        options = _options(args, flag, shuffle=flag == "--train-data")
        options = dataclasses.replace(
            options,
            max_samples=min(rows, options.max_samples or rows),
            cache_dir=None,
            max_bad_rows=float("inf"),  # a share of all rows is not known of the first
        )
        check_rows(_items(args, flag), _tokenizer(args), options)


def _of_validation(flag: str, shuffle: bool) -> dict[str, Any]:
    """What evaluation does not take from training's rows: their order, and what they are."""
    pairs = settings().objective.entry.per_pair
    rows = {"rows": RowKind()} if flag == "--valid-data" and not pairs else {}
    return rows if shuffle else {**rows, "in_order": False}


def prepare(args: Any) -> None:
    """Tokenise into the cache, so that a bad row is named before any model is built.

    Called on the first rank of each node; the others find the cache when they build.
    """
    train = None
    if args.train_data and not args.skip_train:
        train = build(args, "--train-data", None, shuffle=True, progress=True)
        if args.train_epochs is not None:
            schedule.check(with_steps(args, train))
        if train.scores is not None:
            train.scores.check_content(cache_directory(args))
    if (flag := evaluation.data_flag(args)) is not None:
        valid = build(args, flag, None, shuffle=False, progress=True)
        if not settings().whole_evaluation:
            evaluation.check_iters(args, valid.rows_per_pass)
        if train is not None and flag == "--valid-data":
            _warn_of_shared(train, valid)


def _warn_of_shared(train: ChatDataset, valid: ChatDataset) -> None:
    stores = valid.conversations.stores
    count = shared_rows.shared(train.conversations.stores, stores)
    if count:
        terminal.warn(
            f"warning: --valid-data: {count:,} of its {sum(map(len, stores)):,} conversations are "
            "in --train-data too, and their loss tells nothing of others; take them out of one"
        )


def with_steps(args: Any, train: ChatDataset) -> argparse.Namespace:
    """A copy of args with the steps of --train-epochs."""
    rows = train.plan.rows_of_epochs(args.train_epochs)
    steps = schedule.steps_of(rows, args.global_batch_size)
    return argparse.Namespace(**vars(args) | {"train_iters": steps})


def settle(args: Any) -> None:
    """Set what the data decides, on every rank, when it is prepared: the steps of --train-epochs,
    and how many global batches an evaluation reads."""
    if args.train_epochs is not None and not args.skip_train:
        train = build(args, "--train-data", None, shuffle=True)
        args.train_iters = with_steps(args, train).train_iters
    if args.eval_interval == evaluation.OPEN:
        args.eval_interval = evaluation.tenth(args.train_iters or 0)
    if settings().whole_evaluation:
        flag = evaluation.data_flag(args)
        assert flag is not None
        rows = build(args, flag, None, shuffle=False).rows_per_pass
        args.eval_iters = rows // args.eval_global_batch_size
        # Megatron's own way to a whole evaluation counts micro-batches for global ones.
        args.full_validation = False


def _guard_resume(args: Any, train: ChatDataset) -> None:
    """Going on in the middle of other data would skip samples that were never seen."""
    if args.consumed_train_samples and args.load is not None:
        try:
            changes = check_resume(args.load, train.identity, args.allow_data_change)
        except ValueError as error:
            # A refusal, not a crash: the scheduler must not try again.
            raise ResumeError(str(error)) from None
        for line in changes:
            terminal.say_once(f"> resuming with changed data: {line}")
    if args.save is not None and args.rank == 0:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        record(args.save, train.identity)


def datasets_provider(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> Any:
    """(train, validation, test) data sets; Megatron shards them over data-parallel ranks.

    `num_samples`: samples that training, all evaluations together and the test will read.
    """
    args = get_args()
    train = valid = None
    if args.train_data and not args.skip_train:
        train = build(args, "--train-data", num_samples[0], shuffle=True)
        _guard_resume(args, train)
        trained_chat.record(args, train)
        SOURCES[:] = train.sources
        terminal.say_once(f"> {_trains(train)}")
        for line in repeats.warnings(train):
            if args.rank == 0:
                terminal.warn(f"warning: {line}")
        if train.scores is not None:
            model = train.scores.header["model"]
            terminal.say_once(
                f"> reference: stored scores of {model['name']}, made in {model['dtype']}"
            )
    flag = evaluation.data_flag(args)
    if flag is not None and args.eval_iters:
        valid = build(args, flag, num_samples[1], shuffle=False)
        VALID_SOURCES[:] = valid.sources
        if settings().whole_evaluation:
            args.consumed_valid_samples = 0  # every pass is the same, and begins at its beginning
        terminal.say_once(f"> {_evaluates(args, flag, valid.rows_per_pass)}")
    found = {"--train-data": train, "--valid-data": valid}
    agreement.check_start(args, {k: v.identity for k, v in found.items() if v is not None})
    return train, valid, None


# Every rank builds the data sets itself: they are the same pure function of the flags everywhere.
def figures(args: Any) -> list[str]:
    """What a run of these flags would train and evaluate on, a line each; after `settle`."""
    lines = []
    if args.train_data and not args.skip_train:
        samples = args.train_samples or args.train_iters * args.global_batch_size
        train = build(args, "--train-data", samples, shuffle=True)
        lines += [f"{args.train_iters or samples} {'steps' if args.train_iters else 'samples'}"]
        lines += [_trains(train), *(f"warning: {line}" for line in repeats.warnings(train))]
    if (flag := evaluation.data_flag(args)) is not None:
        valid = build(args, flag, None, shuffle=False)
        lines += [_evaluates(args, flag, valid.rows_per_pass)]
    return lines


def _trains(train: ChatDataset) -> str:
    counted = [f"{n} {name.replace('_', ' ')}" for name, n in train.counts.items() if n]
    parts = [f"{train.rows_per_pass} rows an epoch", *counted, repeats.said(train)]
    return f"training data: {', '.join(parts)}"


def _evaluates(args: Any, flag: str, rows: int) -> str:
    read = min(args.eval_iters * args.eval_global_batch_size, rows)
    part = "whole" if read == rows else f"{read} rows at a time"
    when = f"every {args.eval_interval} steps and at the end"
    if args.skip_train or args.eval_interval > (args.train_iters or 0):
        when = "at the end"
    return f"evaluation: {rows} rows of {flag}, {part}, {when}"


datasets_provider.is_distributed = True  # type: ignore[attr-defined]
