"""Which checkpoint a run goes on from, and whether it is still the same run.

Megatron believes its tracker: an empty one ends the job, a dangling one too, and without one
training starts anew whatever lies beside it. Here the directory is looked at before the model is
built: the newest whole checkpoint is taken, the tracker mended, and whatever cannot be resumed is
refused. A run never starts from fresh weights where a checkpoint was once committed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dft.recovery import manifest
from megatron_dft.storage.files import write_whole


class ResumeError(ValueError):
    """The run cannot go on as it is asked to; one line with the remedy."""


@dataclass
class Choice:
    """The checkpoint to load: its step (None: there is none, -1: a release checkpoint).

    `damaged` names what was passed over and why; `run` is what the manifest says about the run.
    """

    iteration: int | None
    damaged: list[str] = field(default_factory=list)
    run: dict[str, Any] | None = None


def _read_tracker(root: Path) -> str | None:
    try:
        return (root / manifest.TRACKER).read_bytes().decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None


def _broadcast(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _faults(directory: Path) -> tuple[list[str], dict[str, Any] | None]:
    """(what is wrong, manifest) of a checkpoint directory. Collective: each rank reads a share."""
    try:
        content = _broadcast(_or_error(directory))
        if isinstance(content, str):
            return [content], None
        if content is None:
            return [], None
        world_size = dist.get_world_size()
        mine = manifest.problems(directory, content, dist.get_rank(), world_size)
    except OSError as error:
        mine = [str(error)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return [problem for part in found for problem in part], content


def _or_error(directory: Path) -> dict[str, Any] | str | None:
    if dist.get_rank() != 0:
        return None
    try:
        content = manifest.read(directory)
        missing = [] if content is None else manifest.unaccounted(directory, content["files"])
    except (ValueError, OSError) as error:
        return str(error)
    if missing:
        return f".metadata names {', '.join(missing)}, which {manifest.FILE_NAME} does not"
    return content


def _foreign_faults(directory: Path) -> list[str]:
    """What lacks in a checkpoint without manifest: imported, or of stock Megatron-LM."""
    if not (directory / "metadata.json").is_file():
        return [f"metadata.json and {manifest.FILE_NAME} are missing"]
    present = {path.name for path in directory.iterdir()}
    return [f"{name} is missing" for name in manifest.unaccounted(directory, present)]


def choose(root: Path, strict: bool, failed: dict[int, str] | None = None) -> Choice:
    """Find the checkpoint of `root` to go on from. Collective over all ranks.

    failed: steps that were chosen before and failed to load, with the reason; they are passed over,
    and so is every later one.

    Raises:
        ResumeError: there were checkpoints and none is whole; or with `strict` the newest is not.
    """
    failed = failed or {}
    tracker, present = _broadcast((_read_tracker(root), manifest.iterations(root)))
    if tracker is None and not present:
        return Choice(None)
    if tracker == "release":
        return Choice(-1)
    named = int(tracker) if tracker is not None and tracker.isdecimal() else -1
    damaged = [f"step {step} fails to load: {reason}" for step, reason in failed.items()]
    if tracker is not None and named < 0:
        damaged.append(f"{manifest.TRACKER} holds {tracker[:40]!r}, not a step")
    if named >= 0 and named not in present:
        damaged.append(f"{manifest.TRACKER} names step {named}, which has no directory")
    # Steps of stock Megatron-LM count where the tracker names one: it is written after their files.
    foreign = _broadcast(
        named in present
        and not (manifest.iteration_directory(root, named) / manifest.FILE_NAME).exists()
    )
    # The tracker may lag behind the newest commit by a kill between the two; it never leads it.
    chosen, run = None, None
    for iteration in reversed(present):
        if failed and iteration >= min(failed):
            continue
        directory = manifest.iteration_directory(root, iteration)
        faults, content = _faults(directory)
        if not faults and content is not None:
            chosen, run = iteration, content["run"]
            break
        if faults:
            damaged.append(f"{directory.name}: {'; '.join(faults)}")
        elif foreign and iteration <= named:
            # Not written by this program (imported, or stock Megatron-LM): taken as it is.
            faults = _broadcast(_foreign_faults(directory) if dist.get_rank() == 0 else None)
            if not faults:
                chosen = iteration
                break
            damaged.append(f"{directory.name}: {'; '.join(faults)}")
        # else: a save that was cut off; it never counted.
    _judge(root, chosen, damaged, strict, tracker)
    return Choice(chosen, damaged, run)


def _judge(
    root: Path, chosen: int | None, damaged: list[str], strict: bool, tracker: str | None
) -> None:
    if chosen is None and (damaged or tracker is not None):
        raise ResumeError(
            f"--load {root}: expected a whole checkpoint, got {'; '.join(damaged)}; restore it, or "
            "start anew with another --save and --load directory"
        )
    if damaged and strict:
        raise ResumeError(
            f"--strict-resume: {'; '.join(damaged)} (in {root}); step {chosen} is whole: drop the "
            "flag to go on from there"
        )


def mend_tracker(root: Path, iteration: int) -> None:
    """Point Megatron's tracker at the chosen step. Collective."""
    if dist.get_rank() == 0 and _read_tracker(root) != str(iteration):
        write_whole(root / manifest.TRACKER, str(iteration))
    dist.barrier()


def changes(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, list[str]]:
    """name → differences in words; the names are those that --allow-change takes."""
    found: dict[str, list[str]] = {}
    for name in sorted({*saved, *current}):
        before, now = saved.get(name), current.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            found[name] = [
                f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
                for key in sorted({*before, *now})
                if before.get(key) != now.get(key)
            ]
        else:
            found[name] = [f"was {before!r}, is {now!r}"]
    return found


# What a run says of itself since a later version: an older checkpoint that lacks it has no say.
_LATER = {"model": ("weights",), "loss": ("reference_weights",)}


def _completed(saved: dict[str, Any], current: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`saved` with what its version did not know taken from `current`, and its names."""
    model = saved.get("model")
    if not isinstance(model, dict) or "weights" in model:
        return saved, []
    saved, added = dict(saved), []
    for part, names in _LATER.items():
        for name in names:
            now = current.get(part)
            if isinstance(now, dict) and name in now and isinstance(saved.get(part), dict):
                saved[part] = saved[part] | {name: now[name]}
                added.append(f"{part} {name}")
    return saved, added


def check_same_run(
    saved: dict[str, Any], current: dict[str, Any], allowed: list[str], where: str
) -> list[str]:
    """Refuse to go on with another loss, model or tokenizer unless it is allowed by name.

    Returns warnings, in words: the differences that are allowed, and what an older checkpoint does
    not say. Raises ResumeError with all other differences.
    """
    saved, unknown = _completed(saved, current)
    found = changes(saved, current)
    lines = {name: f"{name}: {', '.join(parts)}" for name, parts in found.items()}
    refused = [line for name, line in lines.items() if name not in allowed]
    if refused:
        names = " ".join(name for name in lines if name not in allowed)
        raise ResumeError(
            f"--load {where}: its run differs: {'; '.join(refused)}; restore the setting, or go on "
            f"with --allow-change {names}"
        )
    warnings = [f"resuming with a change: {line}" for line in lines.values()]
    if unknown:
        warnings.append(f"{where}: written before {', '.join(unknown)} were recorded; not compared")
    return warnings
