"""One writer a directory: a living owner is named and kept, a dead one is replaced, a link never
followed."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_dft.storage import lock, lock_owner

ROOT = Path(__file__).parents[2]
# Holds the lock until it is told to end, or killed.
HOLDER = """
import sys
from pathlib import Path
from megatron_dft.storage.lock import HeldError, held
try:
    with held("--save", Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except HeldError as error:
    print("refused", error, flush=True)
"""


@contextlib.contextmanager
def holder(directory, **env):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, directory], cwd=ROOT, env=os.environ | env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "SILENT", 0.3)


def test_a_living_owner_is_named_and_kept(tmp_path):
    with holder(tmp_path / "c", SLURM_JOB_ID="77") as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(lock.HeldError) as refusal, lock.held("--save", tmp_path / "c"):
            pass
        for word in ("--save", str(tmp_path / "c"), os.uname().nodename, str(first.pid), "job 77"):
            assert word in str(refusal.value)
        assert "\n" not in str(refusal.value)
        first.communicate("\n")
    with lock.held("--save", tmp_path / "c"):
        assert [path.name for path in (tmp_path / "c").iterdir()] == [lock.NAME]
    assert not list((tmp_path / "c").iterdir())


def test_kill_9_leaves_nothing_that_holds_the_next(tmp_path):
    with holder(tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGKILL)
        first.wait()
    with lock.held("--save", tmp_path):
        pass


def entry(**given):
    """A lock file's text, of another machine unless told otherwise."""
    me = dataclasses.asdict(lock_owner.myself())
    other = {"host": "elsewhere", "space": "another boot", "token": "x"}
    return json.dumps({"program": "megatron_dft", **me, **other, **given})


def test_on_another_machine_beats_are_life_and_silence_is_death(tmp_path, quick):
    path = tmp_path / lock.NAME
    path.write_text(entry(job="5"))
    done = threading.Event()

    def beat():
        # A clock that is an hour behind: only that it moves counts.
        while not done.wait(0.01):
            status = path.stat()
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))

    thread = threading.Thread(target=beat)
    os.utime(path, (1, 1))
    thread.start()
    try:
        with pytest.raises(lock.HeldError, match="elsewhere, job 5"):
            with lock.held("--save", tmp_path):
                pass
    finally:
        done.set()
        thread.join()
    with lock.held("--save", tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_an_earlier_leg_of_the_same_job_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("waited"))
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    (tmp_path / lock.NAME).write_text(entry(job="5", leg=1))
    with lock.held("--save", tmp_path):
        pass


def test_a_process_number_that_was_given_again_is_another_process(tmp_path):
    me = lock_owner.myself()
    (tmp_path / lock.NAME).write_text(entry(host=me.host, space=me.space, started="1"))
    with lock.held("--save", tmp_path):
        pass


def test_the_owner_beats(tmp_path, quick):
    with lock.held("--save", tmp_path):
        path = tmp_path / lock.NAME
        first = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == first:  # the suite's time-out is the limit
            pass


@pytest.mark.parametrize("place", ["link", "dangling", "hard link", "directory", "text", "fifo"])
def test_what_is_no_lock_is_neither_followed_nor_touched(place, tmp_path):
    directory, victim = tmp_path / "c", tmp_path / "precious"
    directory.mkdir()
    path = directory / lock.NAME
    if place != "dangling":
        victim.write_text("mine")
    if place in ("link", "dangling"):
        path.symlink_to(victim)
    elif place == "hard link":
        path.hardlink_to(victim)
    elif place == "directory":
        path.mkdir()
    elif place == "fifo":
        os.mkfifo(path)
    else:
        path.write_text("mine")
    with pytest.raises(ValueError, match="expected a lock file") as refusal:
        with lock.held("--save", directory):
            pass
    assert not isinstance(refusal.value, lock.HeldError) and "\n" not in str(refusal.value)
    assert victim.exists() == (place != "dangling")
    if victim.exists():
        assert victim.read_text() == "mine"


def test_of_many_who_find_a_dead_owner_one_goes_on(tmp_path):
    me = lock_owner.myself()
    (tmp_path / lock.NAME).write_text(entry(host=me.host, space=me.space, started="1"))
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(holder(tmp_path)) for _ in range(8)]
        words = [one.stdout.readline().split()[0] for one in many]
    assert sorted(words) == ["held"] + ["refused"] * 7


def test_a_run_that_was_taken_over_writes_no_more(tmp_path):
    with lock.held("--save", tmp_path):
        lock.check()
        (tmp_path / lock.NAME).unlink()  # deleted by hand: made anew
        lock.check()
        (tmp_path / lock.NAME).write_text(entry())
        with pytest.raises(lock.LostError, match="taken over .* on elsewhere"):
            lock.check()
    assert (tmp_path / lock.NAME).exists()  # it is the other's


def test_without_file_locks_a_dead_owner_is_not_taken_over_but_said(tmp_path, monkeypatch):
    me = lock_owner.myself()
    (tmp_path / lock.NAME).write_text(entry(host=me.host, space=me.space, started="1"))

    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match="has no locks .*No locks available.*; delete"):
        with lock.held("--save", tmp_path):
            pass


def test_two_names_of_one_directory_are_one(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "link").symlink_to("c")
    with holder(tmp_path / "c") as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(lock.HeldError), lock.held("--save", tmp_path / "link"):
            pass


def test_of_two_who_find_a_dead_owner_the_slower_one_stands_back(tmp_path, monkeypatch):
    """The other one has replaced the entry, or the file, between the look and the flock."""
    me, path = lock_owner.myself(), tmp_path / lock.NAME
    alive = entry(host=me.host, space=me.space, token="faster")
    dead = entry(host=me.host, space=me.space, started="1")

    def in_place():
        path.write_text(alive)

    def by_a_new_file():
        path.unlink()
        path.write_text(alive)

    guard = lock.Lock._guard
    for other in (in_place, by_a_new_file):
        path.write_text(dead)
        with monkeypatch.context() as patch:
            patch.setattr(lock.Lock, "_guard", lambda self, fd, o=other: (o(), guard(self, fd)))
            with pytest.raises(lock.HeldError), lock.held("--save", tmp_path):
                pass
        assert json.loads(path.read_text())["token"] == "faster"
