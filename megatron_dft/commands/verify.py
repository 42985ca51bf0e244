"""`megatron-dft verify SAMPLES`: samples → rewards → the rows that train."""

import argparse
from pathlib import Path

from megatron_dft.commands import rollout_flags as flags
from megatron_dft.rollout.keep import DEDUPE, KEEP, WEIGHTS, KeepRules, select, training_rows
from megatron_dft.rollout.pairs import pair_rows, pair_up
from megatron_dft.rollout.prompts import Skips
from megatron_dft.rollout.rewards import reward_samples, unusual
from megatron_dft.rollout.store import json_lines, read_settings
from megatron_dft.rollout.verifiers import verifying
from megatron_dft.storage.files import write_whole
from megatron_dft.storage.terminal import visible

SUMMARY = "reward samples, keep what verifies, write the trainer's JSONL"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", type=Path, help="directory that `megatron-dft sample` wrote")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="training rows with reward and weight, for --train-data; every sample's reward goes "
        "to FILE's name with .rewards.jsonl",
    )
    flags.add_verifier_arguments(parser)
    group = parser.add_argument_group("what is kept")
    add = group.add_argument
    add(
        "--keep",
        choices=KEEP,
        default="correct",
        help="correct: reward of --threshold or more; best: a prompt's highest; all: whatever has "
        "a reward; pairs: a right beside a wrong one of its prompt, for --loss dpo (%(default)s)",
    )
    add("--per-prompt", type=int, metavar="N", help="most rows, or pairs, of a prompt (best: 1)")
    add(
        "--dedupe",
        choices=DEDUPE,
        default="text",
        help="a prompt's samples of one text, or one answer, count once (%(default)s)",
    )
    add(
        "--weight",
        choices=WEIGHTS,
        default="one",
        help="1, the reward, or 1 / kept samples of the prompt (%(default)s)",
    )
    add("--keep-cut", action="store_true", help="keep answers that --max-tokens cut off too")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError where nothing is kept; the rewards are written all the same."""
    rules = KeepRules(
        args.keep, args.threshold, args.per_prompt, args.dedupe, args.weight, args.keep_cut
    )
    rules.check()
    spec = flags.verifier(args)
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: its folder does not exist; make it first")
    raw = bool(read_settings(args.samples).get("raw"))
    with verifying(spec, args.workers) as verify_all:
        rewarded = reward_samples(args.samples, spec.kind, verify_all)
    rewards = args.out.with_name(f"{args.out.stem}.rewards.jsonl")
    write_whole(rewards, json_lines(one.record() for one in rewarded))
    known = [one for one in rewarded if one.reward is not None]
    right = sum(one.reward is not None and one.reward >= args.threshold for one in known)
    mean = sum(one.reward or 0 for one in known) / max(len(known), 1)
    print(f"{len(rewarded):,} samples: {right:,} correct, mean reward {mean:.3f}: {rewards}")
    strange = unusual(rewarded)
    _tell("verifier", strange)
    kept, left = select(rewarded, rules, raw)
    rows = list(training_rows(kept, rules, raw))
    alone = Skips()
    if args.keep == "pairs":
        pairs, alone = pair_up(kept, args.threshold, args.per_prompt)
        _tell("in no pair", alone)
        rows = list(pair_rows(pairs, raw))
    _tell("left out", left)
    if not rows:
        why = "; ".join(str(found) for found in (left, alone) if found.counts)
        raise ValueError(f"--keep {args.keep}: no sample is left to train on: {why}")
    write_whole(args.out, json_lines(rows))
    of = len({row["prompt_number"] for row in rows})
    print(f"{args.out}: {len(rows):,} rows of {of:,} prompts")
    return 0


def _tell(what: str, found: Skips) -> None:
    if found.counts:
        print(visible(f"{what}: {found}"))
