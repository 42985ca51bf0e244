"""kill -9 at five points of a save, a full disk, damage to what was saved: no committed step is
lost, and no run begins anew in silence."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.recovery.runs import assert_same_tensors, run
from tests.train.launch import flags, largest_relative_error, weights

STEPS, SAVES = 6, 2
TRACKER = "latest_checkpointed_iteration.txt"


def _second_call(owner, name, after=False):
    """Replace owner.name by a function that dies at (or after) its second call."""
    plain, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) < 2:
            return plain(*args, **kwargs)
        if after:
            plain(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


def _before_the_first_file():
    from megatron.core import dist_checkpointing

    _second_call(dist_checkpointing, "save")


def _between_files_and_metadata():
    from megatron.core.dist_checkpointing import serialization

    _second_call(serialization, "save_config")


def _before_the_manifest():
    from megatron_dft.recovery import manifest

    _second_call(manifest, "write")


def _between_manifest_and_tracker():
    from megatron_dft.recovery import manifest

    _second_call(manifest, "write", after=True)


def _after_the_tracker():
    from megatron_dft.recovery import commit

    # Called for the tracker alone.
    _second_call(commit, "write_whole", after=True)


# point → the step that a run goes on from
POINTS = {
    _before_the_first_file: 2,
    _between_files_and_metadata: 2,
    _before_the_manifest: 2,
    _between_manifest_and_tracker: 4,
    _after_the_tracker: 4,
}


def arguments(tiny_model, chats, directory, **given):
    where = dict(save=directory, load=directory, save_interval=SAVES)
    return flags(tiny_model, chats, loss="dft", train_iters=STEPS, **where, **given)


def _no_helper_process():
    """A save in the foreground starts none."""
    from multiprocessing import managers

    def start(*args, **kwargs):
        raise AssertionError("a helper process for a save")

    managers.SyncManager.start = start


@pytest.fixture(scope="module")
def whole(tiny_model, chats, tmp_path_factory):
    """The run from start to end, with checkpoints of steps 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("whole")
    words = arguments(tiny_model, chats, directory / "c", save_hf=directory / "hf")
    ended = run(1, *words, status=directory / "status", before=_no_helper_process)
    assert ended.word == "finished"
    ended.checkpoints, ended.exported = directory / "c", directory / "hf"
    return ended


def goes_on(whole, rest, directory, step):
    """As if nothing had been."""
    assert rest.word == "finished" and rest.codes == [0]
    assert f"going on from step {step}\n" in rest.texts[0]
    assert rest.steps == whole.steps[step:]
    assert rest.rows.items() <= whole.rows.items()
    last = f"iter_{STEPS:07d}"
    assert_same_tensors(whole.checkpoints / last, directory / last)


@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.__name__.strip("_"))
def test_a_kill_inside_the_second_save(point, whole, tiny_model, chats, tmp_path):
    status, words = tmp_path / "status", arguments(tiny_model, chats, tmp_path / "c")
    with pytest.raises(TimeoutError, match="died without a word"):
        run(1, *words, status=status, before=point)
    assert not status.exists()
    goes_on(whole, run(1, *words, status=status), tmp_path / "c", POINTS[point])


def _in_the_export():
    from megatron_dft.training import output

    output.Output.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_after_the_last_step_costs_the_export_alone(whole, tiny_model, chats, tmp_path):
    status, exported = tmp_path / "status", tmp_path / "hf"
    words = arguments(tiny_model, chats, tmp_path / "c", save_hf=exported)
    with pytest.raises(TimeoutError, match="died without a word"):
        run(1, *words, status=status, before=_in_the_export)
    assert not status.exists() and not exported.exists()
    saved = (tmp_path / "c" / f"iter_{STEPS:07d}" / "megatron_dft.json").stat().st_mtime_ns
    rest = run(1, *words, status=status)
    assert rest.word == "finished" and not rest.rows
    assert largest_relative_error(weights(exported), weights(whole.exported)) == 0
    assert (tmp_path / "c" / f"iter_{STEPS:07d}" / "megatron_dft.json").stat().st_mtime_ns == saved


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_fails_the_run_and_keeps_the_checkpoint_before(
    whole, tiny_model, chats, tmp_path
):
    disk, status = tmp_path / "disk", tmp_path / "status"
    disk.mkdir()
    words = arguments(tiny_model, chats, disk / "c")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(RuntimeError, match="cannot be written, with 0 MiB free there"):
            run(1, *words, status=status)
        assert not status.exists()
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        goes_on(whole, run(1, *words, status=status), disk / "c", 2)
    finally:
        subprocess.run(["umount", disk], check=True)


def _flipped_byte(root: Path):
    shard = next((root / "iter_0000004").glob("__0_*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def _truncated_shard(root: Path):
    shard = next((root / "iter_0000004").glob("__0_*"))
    os.truncate(shard, shard.stat().st_size - 1)


def _missing_shard(root: Path):
    next((root / "iter_0000004").glob("__0_*")).unlink()


def _empty_tracker(root: Path):
    (root / TRACKER).write_text("")


def _garbage_tracker(root: Path):
    (root / TRACKER).write_text("garbage")


def _dangling_tracker(root: Path):
    (root / TRACKER).write_text("6")


# damage → the step that a run goes on from; steps 2 and 4 are there
DAMAGE = {
    _flipped_byte: 2,
    _truncated_shard: 2,
    _missing_shard: 2,
    _empty_tracker: 4,
    _garbage_tracker: 4,
    _dangling_tracker: 4,
}


@pytest.fixture
def saved(whole, tmp_path):
    """The whole run's directory as it was after step 4."""
    root = tmp_path / "c"
    shutil.copytree(whole.checkpoints, root)
    shutil.rmtree(root / "iter_0000006")
    (root / TRACKER).write_text("4")
    return root


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__.strip("_"))
def test_damage_is_said_and_the_run_goes_on(damage, whole, saved, tiny_model, chats, tmp_path):
    damage(saved)
    rest = run(1, *arguments(tiny_model, chats, saved), status=tmp_path / "status")
    goes_on(whole, rest, saved, DAMAGE[damage])
    assert "; passed over\n" in rest.texts[0]


def test_nothing_whole_and_nothing_trained(saved, tiny_model, chats, tmp_path):
    for step in (2, 4):
        next((saved / f"iter_{step:07d}").glob("__0_*")).unlink()
    words = arguments(tiny_model, chats, saved)
    refused = run(1, *words, status=tmp_path / "status")
    assert refused.codes == [2] and refused.word == "refused" and not refused.rows
    assert "expected a whole checkpoint" in refused.texts[0]
