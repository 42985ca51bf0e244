"""A checkpoint counts only when whole: files, then manifest, then the tracker in one rename.

Wraps three places of Megatron's saving (training/checkpointing.py, save_checkpoint):
`dist_checkpointing.save`, for a clean directory before and the manifest after it; the opening of
the tracker file, which Megatron truncates and then fills; and `save_checkpoint_and_time`, after
which old checkpoints are deleted.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dft.compat.hooks import wrap
from megatron_dft.recovery import manifest, written_hashes
from megatron_dft.storage import lock, terminal
from megatron_dft.storage.files import write_whole


def _rank() -> int:
    return dist.get_rank()


def _on_rank0(action: Callable[[], None]) -> None:
    """Collective: where it fails, every rank raises."""
    failure: list[Any] = [None]
    if _rank() == 0:
        try:
            action()
        except Exception as error:
            # In words: not every error can be sent.
            failure = [str(error) or type(error).__name__]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise RuntimeError(failure[0])


def clear(directory: Path) -> None:
    """Empty a directory that an interrupted save left behind. Collective.

    Raises RuntimeError where another run has taken --save over.
    """

    def empty() -> None:
        lock.check()
        if any(directory.iterdir()):
            terminal.say(f"> {directory}: an interrupted save; its files are removed")
            manifest.remove(directory)
            directory.mkdir()

    _on_rank0(empty)


def commit(directory: Path, run: dict[str, Any]) -> None:
    """Hash the files of a finished save, but for those that its writers hashed, and write the
    manifest. Collective.

    Raises RuntimeError where a file is gone that the checkpoint's own index names.
    """
    known = written_hashes.take(directory, _rank())
    files = manifest.files_of(directory, _rank(), dist.get_world_size())
    mine = manifest.describe(directory, files, known)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)

    def write() -> None:
        files = {k: v for part in parts for k, v in part.items()}
        missing = manifest.unaccounted(directory, files)
        if missing:
            raise RuntimeError(
                f"--save: {directory}: .metadata names {', '.join(missing)}, which nobody finds "
                "there; the checkpoint is not committed, those before it are untouched"
            )
        lock.check()
        manifest.write(directory, files, run)
        terminal.say(f"> checkpoint: {directory}")

    _on_rank0(write)


def delete_old(root: Path, keep: int, current: int) -> list[int]:
    """Delete all but the newest `keep` committed checkpoints up to `current`; rank 0 calls it.

    Returns the steps deleted. Directories that were never finished go too; later ones than
    `current` (a run that was taken back to an earlier step) are not touched.
    """
    earlier = [i for i in manifest.iterations(root) if i < current]
    whole = [
        i for i in earlier if (manifest.iteration_directory(root, i) / manifest.FILE_NAME).exists()
    ]
    kept = set(whole[len(whole) - (keep - 1) :] if keep > 1 else [])
    gone = [i for i in earlier if i not in kept]
    for iteration in gone:
        manifest.remove(manifest.iteration_directory(root, iteration))
    return gone


class _WholeFile(io.StringIO):
    """Takes a file's text and writes it in one rename when it is closed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)

    def close(self) -> None:
        if not self.closed:
            write_whole(self.path, self.getvalue())
        super().close()

    def __exit__(self, kind, *rest):
        if kind is not None:
            io.StringIO.close(self)  # the writer failed: leave the old file
        return super().__exit__(kind, *rest)


class _AtomicTracker:
    """megatron.core's file layer, except that the tracker is replaced and never truncated."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def open(self, path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "w" and Path(path).name == manifest.TRACKER:
            return _WholeFile(path)
        return self._layer.open(path, mode, *args, **kwargs)


def install(run: Callable[[], dict[str, Any]], keep: int | None) -> None:
    """Hook committing into Megatron's saving.

    Args:
        run: what the manifest says about the run, asked at each save.
        keep: number of checkpoints to keep; None keeps all.
    """
    from megatron.training import get_args

    def saving(original):
        def save(state, checkpoint_dir, *args, **kwargs):
            directory = Path(checkpoint_dir)
            clear(directory)
            try:
                request = original(state, checkpoint_dir, *args, **kwargs)
            except (Exception, CheckpointException) as error:  # the latter is a BaseException
                # torch's words for a full disk are "unexpected pos 704 vs 598".
                free = shutil.disk_usage(directory).free / 2**20
                raise RuntimeError(
                    f"--save: {directory} cannot be written, with {free:.0f} MiB free there; those "
                    "before it are untouched"
                ) from error
            if request is None:
                commit(directory, run())
            else:
                ranks = _rank(), dist.get_world_size()
                request = written_hashes.in_the_background(request, directory, *ranks)
                content = run()  # the finalizer runs when training has gone on
                request.finalize_fns.append(lambda: commit(directory, content))
            return request

        return save

    def deleting(original):
        def save_checkpoint_and_time(iteration, *args, **kwargs):
            original(iteration, *args, **kwargs)
            if keep is not None and _rank() == 0:
                gone = delete_old(Path(get_args().save), keep, iteration)
                if gone:
                    terminal.say(f"> checkpoints of steps {gone} are deleted (--keep-last)")

        return save_checkpoint_and_time

    def replacing(original):
        return _AtomicTracker(original)

    wrap("megatron.core.dist_checkpointing:save", saving)
    wrap("megatron.training.training:save_checkpoint_and_time", deleting)
    wrap("megatron.training.checkpointing:maybe_msc", replacing)
