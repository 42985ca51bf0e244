"""One writer a directory: a lock file that names its owner, beats while it lives, and is taken over
from a dead one.

The file is made by O_EXCL, which every file system and NFS since version 3 keep to. Whether its
owner lives is asked of the kernel where that is possible (same machine, boot and process
namespace: process number and start time), of Slurm's count of restarts within one job, and
otherwise of the file itself: a living owner touches it every `BEAT` seconds. No clock of another
machine is believed; the one who waits counts by its own. Taking over happens under flock, so that
two who find the same dead owner do not both go on; where the file system has no locks, that alone
is refused.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_dft.storage import terminal
from megatron_dft.storage.lock_owner import PROGRAM, Owner, is_dead, myself, parse

BEAT = 10.0  # seconds between two touches
SILENT = 90.0  # seconds without one, after which an owner on another machine is dead
NAME = ".megatron_dft.lock"
_SIZE = 1024  # bytes of every lock: one write replaces a whole one


class HeldError(ValueError):
    """Another run writes there; one line with the remedy."""


class LostError(RuntimeError):
    """Another run has taken the directory over; nothing more may be written to it."""


class Lock:
    """The lock file at `path`; `flag` and `directory` are what its messages speak of."""

    def __init__(self, path: Path, flag: str, directory: Path) -> None:
        self.path, self.flag, self.directory = path, flag, directory
        self.owner = myself()
        self._done = threading.Event()

    def take(self) -> None:
        """Own the directory from here on.

        Raises:
            HeldError: another run does.
            ValueError: the lock cannot be made, or what stands in its place is none.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not (self._make() or self._take_over()):
                pass
        except OSError as error:
            raise ValueError(
                f"{self.flag}: {self.path} cannot be written: {error.strerror}; choose another "
                "directory"
            ) from None
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def check(self) -> None:
        """Raise LostError unless the lock is still this process's; one that was deleted is made
        anew."""
        with contextlib.suppress(FileNotFoundError):
            with self._open() as fd:
                found = parse(os.read(fd, _SIZE + 1))
            if found is None or found.token != self.owner.token:
                raise LostError(
                    f"{self.flag}: {self.directory} was taken over while this run stood still, by "
                    f"{found or 'another'}; nothing more is written"
                )
            return
        if not self._make():
            self.check()

    def release(self) -> None:
        """Delete the file, where it is still ours."""
        self._done.set()
        if os.getpid() != self.owner.pid:
            return
        with contextlib.suppress(OSError, ValueError), self._open() as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            found = parse(os.read(fd, _SIZE + 1))
            if found is not None and found.token == self.owner.token:
                os.unlink(self.path)

    def _content(self) -> bytes:
        entry = {"program": PROGRAM, **dataclasses.asdict(self.owner)}
        return json.dumps(entry).encode().ljust(_SIZE - 1) + b"\n"

    def _make(self) -> bool:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(fd, self._content())
            os.fsync(fd)
        finally:
            os.close(fd)
        return True

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        """The file as it stands; neither through a link, nor a file that has another name too."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._foreign("is a link or no file") from None
            raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise self._foreign("is a link or no file")
            yield fd
        finally:
            os.close(fd)

    def _foreign(self, what: str) -> ValueError:
        return ValueError(
            f"{self.flag}: {self.path}: expected a lock file, but it {what}; look at it, delete it"
        )

    def _look(self) -> tuple[Owner | None, tuple[int, int]] | None:
        """(owner, what a beat changes); None where the file is gone."""
        try:
            with self._open() as fd:
                status = os.fstat(fd)
                return parse(os.read(fd, _SIZE + 1)), (status.st_ino, status.st_mtime_ns)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise (error if self.flag in str(error) else self._foreign(str(error))) from None

    def _take_over(self) -> bool:
        """False where the lock may be free now."""
        seen = self._look()
        if seen is None:
            return False
        owner, mark = seen
        dead = None if owner is None else is_dead(owner, self.owner)
        if dead is None:
            seen = self._wait(owner, mark)
            if seen is None:
                return False
            dead = seen == (owner, mark)
        if not dead:
            raise HeldError(
                f"{self.flag}: {self.directory} is being written by {(seen or (owner,))[0]}; end "
                f"that run, or choose another directory (the lock: {self.path})"
            )
        return self._replace(owner)

    def _wait(
        self, owner: Owner | None, mark: tuple[int, int]
    ) -> tuple[Owner | None, tuple[int, int]] | None:
        """What is there after a beat of the owner, or after a silence that means its death."""
        terminal.warn(
            f"{self.path} is held by {owner or 'an unknown process'}: waiting up to {SILENT:g} s "
            "for a sign of life"
        )
        end = time.monotonic() + SILENT
        seen: tuple[Owner | None, tuple[int, int]] | None = (owner, mark)
        while seen == (owner, mark) and time.monotonic() < end:
            # An entry that is still being written comes at once.
            time.sleep(BEAT / 4 if owner else min(BEAT / 4, 0.1))
            seen = self._look()
        return seen

    def _replace(self, owner: Owner | None) -> bool:
        """Write over a dead owner's entry; False where somebody else was faster."""
        try:
            with self._open() as fd:
                self._guard(fd)
                current = os.stat(self.path, follow_symlinks=False)
                if current.st_ino != os.fstat(fd).st_ino:
                    return False
                if parse(os.read(fd, _SIZE + 1)) != owner:
                    return False
                os.pwrite(fd, self._content(), 0)
                os.fsync(fd)
        except FileNotFoundError:
            return False
        terminal.warn(f"{self.path}: {owner or 'its owner'} is dead; taken over")
        return True

    def _guard(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"{self.flag}: the run that wrote {self.directory} is dead, but its file system "
                f"has no locks ({error.strerror}), under which alone it can be taken over; delete "
                f"{self.path}"
            ) from None

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with contextlib.suppress(OSError, ValueError), self._open() as fd:
                found = parse(os.read(fd, _SIZE + 1))
                if found is not None and found.token == self.owner.token:
                    os.utime(fd)


_held: list[Lock] = []


@contextlib.contextmanager
def held(flag: str, directory: Path, beside: bool = False) -> Iterator[None]:
    """Own `directory` for the length of a with block; `Lock.take` says what is raised.

    beside: the directory is replaced as a whole, so that its lock stands next to it.
    """
    real = Path(os.path.realpath(directory))
    path = real.parent / f".{real.name}.lock" if beside else real / NAME
    lock = Lock(path, flag, directory)
    lock.take()
    _held.append(lock)
    try:
        yield
    finally:
        _held.remove(lock)
        lock.release()


def check() -> None:
    """Raise LostError where a directory that this process holds was taken over."""
    for lock in _held:
        lock.check()
