"""The data sets of a run, in the form that Megatron's loop asks for them."""

from pathlib import Path
from typing import Any

from megatron.training import get_args, print_rank_0

from megatron_dft.data.dataset import ChatDataset, build_dataset
from megatron_dft.data.fingerprint import check_resume, record
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.tokenizer import load_tokenizer
from megatron_dft.flags.data import cache_directory, dataset_options
from megatron_dft.flags.settings import settings
from megatron_dft.recovery.resume import ResumeError
from megatron_dft.step.loss import SOURCES
from megatron_dft.training import agreement, trained_chat


def build(
    args: Any, flag: str, num_samples: int | None, shuffle: bool, progress: bool = False
) -> ChatDataset:
    """The data set of --train-data, --valid-data or --valid-share (`flag`)."""
    checkpoint = settings().checkpoint
    assert checkpoint is not None
    tokenizer = load_tokenizer(
        checkpoint.path, args.chat_template, trust_remote_code=args.trust_remote_code
    )
    context = args.context_parallel_size
    options = dataset_options(args) | {"cache_dir": cache_directory(args)}
    return build_dataset(
        args.valid_data if flag == "--valid-data" else args.train_data,
        tokenizer,
        DatasetOptions(
            seq_length=args.seq_length,
            num_samples=num_samples,
            seed=args.seed,
            pad_multiple=2 * context if context > 1 else 1,
            shuffle=shuffle,
            batch_multiple=1 if shuffle else args.global_batch_size,
            progress=progress,
            flag=flag,
            reference_scores=settings().reference_scores if flag == "--train-data" else None,
            vocab_size=settings().vocab_size,
            held_out_part=flag == "--valid-share",
            **(options | ({"reading": None} if flag == "--valid-data" else {})),
        ),
    )


def prepare(args: Any) -> None:
    """Tokenise into the cache, so that a bad row is named before any model is built.

    Called on the first rank of each node; the others find the cache when they build.
    """
    if args.train_data and not args.skip_train:
        train = build(args, "--train-data", None, shuffle=True, progress=True)
        if train.scores is not None:
            train.scores.check_content(cache_directory(args))
    if args.valid_data or args.valid_share:
        build(args, _validation(args), None, shuffle=False, progress=True)


def _validation(args: Any) -> str:
    """The flag that names what is evaluated on."""
    return "--valid-data" if args.valid_data else "--valid-share"


def _guard_resume(args: Any, train: ChatDataset) -> None:
    """Going on in the middle of other data would skip samples that were never seen."""
    if args.consumed_train_samples and args.load is not None:
        try:
            changes = check_resume(args.load, train.identity, args.allow_data_change)
        except ValueError as error:
            # A refusal, not a crash: the scheduler must not try again.
            raise ResumeError(str(error)) from None
        for line in changes:
            print_rank_0(f"> resuming with changed data: {line}")
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
        counted = {name: count for name, count in train.counts.items() if count}
        print_rank_0(f"> training data: {train.rows_per_pass} rows an epoch, {counted}")
        if train.scores is not None:
            model = train.scores.header["model"]
            print_rank_0(f"> reference: stored scores of {model['name']}, made in {model['dtype']}")
    if (args.valid_data or args.valid_share) and (args.full_validation or args.eval_iters):
        valid = build(args, _validation(args), num_samples[1], shuffle=False)
    found = {"--train-data": train, "--valid-data": valid}
    agreement.check_start(args, {k: v.identity for k, v in found.items() if v is not None})
    return train, valid, None


# Every rank builds the data sets itself: they are the same pure function of the flags everywhere.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]
