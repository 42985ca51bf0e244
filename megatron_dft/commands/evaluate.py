"""`megatron-dft evaluate`: checkpoints × sets → pass@1, Avg@k, maj@k side by side."""

import argparse
import multiprocessing
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_dft.commands import rollout_flags as flags
from megatron_dft.commands.sample import tell_left_out
from megatron_dft.rollout import score_table
from megatron_dft.rollout.prompts import Prompt, Skips, read_prompts
from megatron_dft.rollout.rewards import Rewarded, reward_samples, unusual
from megatron_dft.rollout.sampler import draw_samples
from megatron_dft.rollout.store import json_lines
from megatron_dft.rollout.verifiers import VerifyAll, verifying
from megatron_dft.storage.files import write_whole

SUMMARY = "pass@1, Avg@k and maj@k with intervals, several checkpoints and sets side by side"

_NAMED = re.compile(r"([\w.@+-]+)=(.+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="[LABEL=]MODEL",
        help="checkpoints, or the server's names for them; each is compared with those before it",
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE",
        help="prompts with reference answers",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="samples, rewards, scores.json and scores.png",
    )
    flags.add_prompt_arguments(parser)
    flags.add_decoding_arguments(parser, samples=16)
    flags.add_backend_arguments(parser)
    flags.add_verifier_arguments(parser)


def named(items: Sequence[str], flag: str) -> dict[str, str]:
    """name → what it names; a bare item's name is its last path component without suffix.

    Raises ValueError where two would have one name.
    """
    found: dict[str, str] = {}
    for item in items:
        match = _NAMED.fullmatch(item)
        name, value = match.groups() if match else (Path(item).name.partition(".")[0], item)
        name = name if match or Path(item).is_file() else Path(item).name
        if name in found or name == "mean":
            raise ValueError(f"{flag}: the name {name!r} is taken; give another, NAME={value}")
        found[name] = value
    return found


def run(args: argparse.Namespace) -> int:
    how, part, shape = flags.decoding(args), flags.part(args), flags.shape(args)
    spec = flags.verifier(args)
    models, files = named(args.models, "--models"), named(args.sets, "--sets")
    sets: dict[str, list[Prompt]] = {}
    for name, file in files.items():
        sets[name], skips = read_prompts([file], shape, f"--sets {name}")
        if skips.counts:
            print(f"{name}: skipped rows: {skips}", file=sys.stderr)
    _sample_all(args, models, sets, how)
    if part != (0, 1):
        print("this part is drawn; without --part, once all are, the scores come")
        return 0
    with verifying(spec, args.workers) as verify_all:
        rewarded = {
            label: {name: _rewarded(args, spec.kind, verify_all, label, name) for name in sets}
            for label in models
        }
    _same_prompts(rewarded)
    found = {
        label: {name: score_table.score(one, args.threshold, name) for name, one in by_set.items()}
        for label, by_set in rewarded.items()
    }
    scores = {label: {s: pair[0] for s, pair in sets.items()} for label, sets in found.items()}
    notes = {label: {s: pair[1] for s, pair in sets.items()} for label, sets in found.items()}
    result = score_table.as_json(scores, notes) | {"models": models, "sets": files}
    score_table.write(args.out, result)
    console = Console()
    console.width = max(console.width, 40 + 26 * (len(sets) + 1))
    score_table.show(result, console)
    print(f"{args.out / 'scores.json'}, {args.out / 'scores.png'}")
    return 0


def _sample_all(args: argparse.Namespace, models: Any, sets: Any, how: Any) -> None:
    if len(models) == 1 or args.endpoint:
        for label, model in models.items():
            _sample(args, label, model, sets, how)
        return
    # A process for each checkpoint: with it all of its GPU's memory is given back.
    context = multiprocessing.get_context("spawn")
    for label, model in models.items():
        with ProcessPoolExecutor(1, context) as pool:
            pool.submit(_sample, args, label, model, sets, how).result()


def _sample(
    args: argparse.Namespace, label: str, model: str, sets: dict[str, list[Prompt]], how: Any
) -> None:
    backend = flags.backend(args, model, how)
    for name, prompts in sets.items():
        outcome = draw_samples(
            _folder(args, label, name),
            prompts,
            args.samples,
            how,
            backend,
            settings=flags.rendering_settings(args),
            part=flags.part(args),
            label=f"{label} on {name}",
        )
        print(f"{label} on {name}: {outcome.line()}", flush=True)
        tell_left_out(outcome, Skips())
        if outcome.missing:
            raise ValueError(
                f"{label} on {name}: {outcome.missing} samples are missing ({outcome.faults}); "
                "the same command draws them"
            )


def _rewarded(
    args: argparse.Namespace, kind: str, verify_all: VerifyAll, label: str, name: str
) -> list[Rewarded]:
    folder = _folder(args, label, name)
    found = reward_samples(folder, kind, verify_all, f"{label} on {name}")
    write_whole(folder / "rewards.jsonl", json_lines(one.record() for one in found))
    strange = unusual(found)
    if strange.counts:
        print(f"{label} on {name}: {strange}")
    return found


def _same_prompts(rewarded: dict[str, dict[str, list[Rewarded]]]) -> None:
    """Leave out prompts that not every checkpoint could be asked."""
    for name in next(iter(rewarded.values())):
        asked = [{one.prompt.number for one in sets[name]} for sets in rewarded.values()]
        common, every = set.intersection(*asked), set.union(*asked)
        if common != every:
            print(f"{name}: {len(every - common)} prompts left out that not all could be asked")
        if not common:
            raise ValueError(f"--sets {name}: no prompt was answered by every checkpoint")
        for sets in rewarded.values():
            sets[name] = [one for one in sets[name] if one.prompt.number in common]


def _folder(args: argparse.Namespace, label: str, name: str) -> Path:
    return args.out / "samples" / label / name
