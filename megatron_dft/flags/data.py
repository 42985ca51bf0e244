"""The command line's data flags, for every command that reads chat data."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from megatron_dft.data.overlong import OVERLONG
from megatron_dft.data.prepare import ERRORS
from megatron_dft.data.reading import parse_columns
from megatron_dft.data.schema import FORMATS
from megatron_dft.data.spec import DROPS, REWRITES, RowKind
from megatron_dft.flags import data_values

DEFAULT_MAX_BAD_ROWS = 0.001
WRONG_REWARD = -0.2


def add_layout(group: Any) -> None:
    """Adds the flags of what a row is to a parser or group, for every command that reads rows."""
    group.add_argument(
        "--data-format",
        choices=FORMATS,
        default=None,
        help="layout of the rows; recognised by their columns where it is not given",
    )
    group.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME=COLUMN",
        default=[],
        help="where the rows have other names: prompt=question completion=answer trains text as it "
        "stands, instruction=question output=answer puts it through the chat template; also "
        "messages=, conversations=, input=, history=, system=, tools=, weight=",
    )


def add_arguments(group: Any) -> None:
    """Adds the data flags to an argparse parser or group (shared by train and inspect-data)."""
    add = group.add_argument
    add(
        "--train-data",
        nargs="+",
        metavar="[W:]PATH",
        default=None,
        help="training conversations: .jsonl(.gz|.zst), .parquet or .csv files, directories of "
        "them, data sets that `datasets` saved, or hub names (org/name or org/name@split); with "
        "weights (0.7:a.jsonl 0.3:b.parquet) an epoch draws its conversations in these "
        "proportions, with cap=1000:a.jsonl at most so many of an item, with epochs=2:b.parquet "
        "each of them so many times; 0.7,cap=1000:a.jsonl is both",
    )
    add(
        "--valid-data",
        nargs="+",
        metavar="PATH",
        default=None,
        help="conversations to evaluate on, each once per evaluation, in file order, ten times "
        "a run; --eval-interval and --eval-iters change that",
    )
    add(
        "--valid-share",
        type=data_values.valid_share,
        default=0.0,
        metavar="F",
        help="in place of --valid-data: hold out this share of the rows of each item of "
        "--train-data and evaluate on them; rows are chosen by their content, so that every run "
        "with the same data holds out the same, and copies of a row stay together",
    )
    add_layout(group)
    add(
        "--mask-history",
        action="store_true",
        help="of each conversation the last assistant turn trains alone, those before are context",
    )
    add(
        "--max-samples",
        type=data_values.whole_number,
        metavar="N",
        help="read the first N rows of each item alone: a trial run",
    )
    # Megatron's own parser has this flag already, with the same meaning here.
    if "--chat-template" not in group._option_string_actions:
        add(
            "--chat-template",
            metavar="FILE",
            default=None,
            help="Jinja file that replaces the tokenizer's own chat template",
        )
    add(
        "--chat-template-args",
        metavar="JSON",
        default=None,
        type=data_values.template_args,
        help="variables for the template, as a JSON object, e.g. '{\"enable_thinking\": false}'",
    )
    add(
        "--template-date",
        metavar="YYYY-MM-DD",
        default=None,
        type=data_values.template_date,
        help="the date that a template is told which prints today's; such a template is refused "
        "without it, because the tokens would change from day to day",
    )
    add(
        "--chat-rewrites",
        choices=REWRITES,
        default="per-turn",
        help="where a template rewrites earlier turns when later ones follow (Qwen3 drops their "
        "reasoning): make each assistant turn a sample of its own, or refuse the data",
    )
    add(
        "--chat-drops",
        choices=DROPS,
        default="refuse",
        help="rows with a part that the template prints nowhere (a developer message, reasoning, "
        "tool calls): refuse them, or train without that part and say so",
    )
    add(
        "--overlong",
        choices=OVERLONG,
        default="refuse",
        help="conversations that do not fit --seq-length: refuse to start, drop them, or cut them "
        "behind the last whole assistant turn that fits; always counted",
    )
    add(
        "--reward-weights",
        action="store_true",
        help="multiply each row's weight by its reward, as `megatron-dft verify` writes it; rows "
        "of reward 0 are left out; --loss rift takes rewards by itself",
    )
    add(
        "--wrong-reward",
        type=float,
        default=None,
        metavar="R",
        help="--loss rift: what a row of reward 0, a wrong answer, counts as; default: -0.2 (arXiv "
        "2601.09253), 0 leaves such rows out",
    )
    add(
        "--no-shuffle",
        action="store_true",
        help="train in the order of the items and their rows, in every epoch; packing moves a "
        "conversation by at most a thousand rows",
    )
    add(
        "--no-packing",
        action="store_true",
        help="one conversation a row, padded, instead of as many as fit",
    )
    add(
        "--data-errors",
        choices=ERRORS,
        default="strict",
        help="a row that cannot be trained on stops the run before it begins (strict), or is left "
        "out, counted and logged (skip)",
    )
    add(
        "--max-bad-rows",
        type=data_values.max_bad_rows,
        default=None,
        metavar="N",
        help="with --data-errors skip: how many rows may be bad, as a share of all below 1 "
        "(default 0.001), as a count from 1 on",
    )
    add(
        "--data-cache",
        metavar="DIR",
        default=None,
        help="where tokenised data is kept between runs; on several machines a shared directory. "
        "Default: ~/.cache/megatron_dft/data, or $MEGATRON_DFT_DATA_CACHE",
    )
    add(
        "--data-workers",
        type=data_values.whole_number,
        default=None,
        metavar="N",
        help="tokenising processes; default: one a core",
    )
    add("--allow-data-change", action="store_true",
        help="resume although the data, tokenizer, template, seed or row length differ from those "
        "that the checkpoint was trained with")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raise one ValueError where a run has nothing to train or evaluate on."""
    if not args.train_data and not args.skip_train:
        raise ValueError(
            "--train-data: expected at least one file of conversations, got none; name one"
        )


def cache_directory(args: argparse.Namespace) -> Path:
    """--data-cache, $MEGATRON_DFT_DATA_CACHE, or a directory of the user's."""
    chosen = args.data_cache or os.environ.get("MEGATRON_DFT_DATA_CACHE")
    return Path(chosen or "~/.cache/megatron_dft/data").expanduser()


def dataset_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that train and validation data share, as keywords of dataset.build_dataset.

    Raises ValueError for flags that contradict each other.
    """
    if args.max_bad_rows is not None and args.data_errors == "strict":
        raise ValueError(
            f"--max-bad-rows {args.max_bad_rows:g} has no meaning with --data-errors strict, which "
            "allows none; give --data-errors skip, or drop it"
        )
    if args.valid_share and args.valid_data:
        raise ValueError(
            f"--valid-share {args.valid_share:g} holds out a part of --train-data, and "
            "--valid-data is given too; keep one of them"
        )
    if args.valid_share and not args.train_data:
        raise ValueError(
            f"--valid-share {args.valid_share:g} holds out a part of --train-data, and none is "
            "given; give it"
        )
    return dict(
        packing=not args.no_packing,
        overlong=args.overlong,
        errors=args.data_errors,
        max_bad_rows=DEFAULT_MAX_BAD_ROWS if args.max_bad_rows is None else args.max_bad_rows,
        cache_dir=cache_directory(args),
        data_format=args.data_format,
        template_args=args.chat_template_args,
        template_date=args.template_date,
        rewrites=args.chat_rewrites,
        drops=args.chat_drops,
        valid_share=args.valid_share,
        columns=parse_columns(args.columns),
        mask_history=args.mask_history,
        max_samples=args.max_samples,
        in_order=args.no_shuffle,
        workers=args.data_workers,
        rows=_row_kind(args),
    )


def _row_kind(args: argparse.Namespace) -> RowKind:
    """What rows are under --loss; without that flag (inspect-data's default) conversations."""
    loss = getattr(args, "loss", None)
    if args.wrong_reward is not None and loss != "rift":
        raise ValueError(f"--wrong-reward: belongs to --loss rift, got --loss {loss}; drop it")
    if args.reward_weights and loss in ("rift", "dpo"):
        raise ValueError(f"--reward-weights: has no meaning under --loss {loss}; drop it")
    if loss == "dpo":
        return RowKind("pairs")
    if loss == "rift":
        wrong = WRONG_REWARD if args.wrong_reward is None else args.wrong_reward
        if not -math.inf < wrong <= 0:
            raise ValueError(f"--wrong-reward: expected at most 0, got {wrong:g}; -0.2 is usual")
        return RowKind("rewarded", wrong)
    return RowKind("weighted") if args.reward_weights else RowKind()
