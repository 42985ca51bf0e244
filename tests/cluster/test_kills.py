"""kill -9 at five points of a save, and a full disk: nothing committed is lost."""

import os
import signal
import subprocess

import pytest

from tests.cluster.runs import assert_same_tensors, run
from tests.train.launch import flags

pytestmark = pytest.mark.slow


def _die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _second_call(owner, name, after=False):
    """Replace owner.name by a function that dies at (or after) its second call."""
    plain, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) < 2:
            return plain(*args, **kwargs)
        if after:
            plain(*args, **kwargs)
        _die()

    setattr(owner, name, dying)


def _before_the_first_file():
    from megatron.core import dist_checkpointing

    _second_call(dist_checkpointing, "save")


def _between_files_and_metadata():
    from megatron.core.dist_checkpointing import serialization

    _second_call(serialization, "save_config")


def _before_the_manifest():
    from megatron_dft.cluster import manifest

    _second_call(manifest, "write")


def _between_manifest_and_tracker():
    from megatron_dft.cluster import manifest

    _second_call(manifest, "write", after=True)


def _after_the_tracker():
    from megatron_dft.cluster import commit

    # Called for the tracker alone.
    _second_call(commit, "write_whole", after=True)


POINTS = {
    _before_the_first_file: 2,
    _between_files_and_metadata: 2,
    _before_the_manifest: 2,
    _between_manifest_and_tracker: 4,
    _after_the_tracker: 4,
}


def arguments(tiny_model, chats, directory):
    return flags(
        tiny_model,
        chats,
        train_iters=6,
        save=directory,
        load=directory,
        save_interval=2,
        loss="dft",
    )


@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.__name__.strip("_"))
def test_a_kill_inside_the_second_save(point, tiny_model, chats, tmp_path):
    status = tmp_path / "status"
    whole = run(1, *arguments(tiny_model, chats, tmp_path / "whole"), status=status)
    with pytest.raises(TimeoutError):
        run(1, *arguments(tiny_model, chats, tmp_path / "c"), status=status, before=point)
    assert not status.exists()
    rest = run(1, *arguments(tiny_model, chats, tmp_path / "c"), status=status)
    assert f"going on from step {POINTS[point]}\n" in rest.texts[0]
    assert rest.word == "finished"
    assert rest.steps == whole.steps[POINTS[point] :]
    assert_same_tensors(tmp_path / "whole/iter_0000006", tmp_path / "c/iter_0000006")


def test_a_full_disk_fails_the_run_and_keeps_the_checkpoint_before(tiny_model, chats, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk, status = tmp_path / "disk", tmp_path / "status"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(Exception, match="No space left|ENOSPC|Errno 28|file write"):
            run(1, *arguments(tiny_model, chats, disk / "c"), status=status)
        assert not status.exists()
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        rest = run(1, *arguments(tiny_model, chats, disk / "c"), status=status)
        assert rest.word == "finished" and "going on from step 2\n" in rest.texts[0]
        assert [s["step"] for s in rest.steps] == [3, 4, 5, 6]
    finally:
        subprocess.run(["umount", disk], check=True)
