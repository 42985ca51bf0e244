"""Damaged directories and changed runs: what is taken, what is named, what is refused."""

import json
import shutil

import pytest

from tests.ranks import run_ranks
from tests.recovery.runs import run
from tests.train.launch import flags

FILES = {"__0_0.distcp": b"weights" * 9, "__1_0.distcp": b"moments" * 9, "metadata.json": b"{}"}


def _commit(root, iteration):
    from megatron_dft.recovery import manifest

    directory = manifest.iteration_directory(root, iteration)
    directory.mkdir(parents=True)
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    files = {}
    for rank in range(2):
        mine = manifest.describe(directory, manifest.files_of(directory, rank, 2))
        assert set(mine) == ({"__1_0.distcp"} if rank else {"__0_0.distcp", "metadata.json"})
        files |= mine
    manifest.write(directory, files, {"identity": {}, "iteration": iteration})
    (root / manifest.TRACKER).write_text(str(iteration))
    return directory


def _choose(root, strict):
    from megatron_dft.recovery import resume

    try:
        choice = resume.choose(root, strict)
    except resume.ResumeError as error:
        return "refused", str(error)
    if choice.iteration is not None and choice.iteration >= 0:
        resume.mend_tracker(root, choice.iteration)
    return choice.iteration, "; ".join(choice.damaged)


def choose(root, strict=False):
    """The same answer on both ranks."""
    first, second = run_ranks(_choose, 2, root, strict)
    assert first == second
    return first


@pytest.fixture
def root(tmp_path):
    """Steps 10 and 20, both whole."""
    _commit(tmp_path / "c", 10)
    _commit(tmp_path / "c", 20)
    return tmp_path / "c"


def tracker(root):
    return (root / "latest_checkpointed_iteration.txt").read_text()


def flip(root):
    path = root / "iter_0000020" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def truncate(root):
    (root / "iter_0000020" / "__0_0.distcp").write_bytes(FILES["__0_0.distcp"][:-1])


def lose(root):
    (root / "iter_0000020" / "__1_0.distcp").unlink()


def spoil_manifest(root):
    (root / "iter_0000020" / "megatron_dft.json").write_text('{"version"')


def lose_directory(root):
    shutil.rmtree(root / "iter_0000020")


def empty_tracker(root):
    (root / "latest_checkpointed_iteration.txt").write_text("")
    flip(root)


DAMAGE = {
    flip: "iter_0000020: __1_0.distcp does not have its checksum",
    truncate: "iter_0000020: __0_0.distcp has 62 bytes, not 63",
    lose: "iter_0000020: __1_0.distcp is missing",
    spoil_manifest: "iter_0000020: megatron_dft.json is not readable",
    lose_directory: "names step 20, which has no directory",
    empty_tracker: "holds '', not a step",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_damage_is_named_and_the_checkpoint_before_is_used_or_refused(damage, root):
    damage(root)
    outcome, message = choose(root, strict=True)
    assert outcome == "refused" and DAMAGE[damage] in message and "step 10 is whole" in message
    outcome, message = choose(root)
    assert outcome == 10 and DAMAGE[damage] in message
    assert tracker(root) == "10"


@pytest.mark.parametrize("words", ["", "garbage", "-3", "30", "\x00\xff"])
def test_a_spoilt_tracker_costs_nothing(words, root):
    (root / "latest_checkpointed_iteration.txt").write_text(words)
    outcome, message = choose(root)
    assert outcome == 20 and "latest_checkpointed_iteration.txt" in message
    assert tracker(root) == "20"


def test_whole_checkpoints_and_unfinished_ones(root, tmp_path):
    assert choose(root) == (20, "")
    # Cut off between the commit and the tracker.
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    assert choose(root) == (20, "") and tracker(root) == "20"
    # Cut off inside the save: it never counted.
    shutil.copytree(root / "iter_0000020", root / "iter_0000030")
    (root / "iter_0000030" / "megatron_dft.json").unlink()
    assert choose(root, strict=True) == (20, "")
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert choose(root)[0] == 20
    # The first save of all was cut off: there is nothing to go on from, and nothing lost.
    fresh = tmp_path / "fresh"
    (fresh / "iter_0000010").mkdir(parents=True)
    assert choose(fresh) == (None, "")
    assert choose(tmp_path / "absent") == (None, "")


def test_nothing_whole_is_refused_and_not_begun_anew(root):
    for step in (10, 20):
        (root / f"iter_{step:07d}" / "__0_0.distcp").unlink()
    outcome, message = choose(root)
    assert outcome == "refused"
    assert "iter_0000020" in message and "iter_0000010" in message and "start anew" in message
    lone = root.parent / "lone"
    lone.mkdir()
    (lone / "latest_checkpointed_iteration.txt").write_text("")
    assert choose(lone)[0] == "refused"


def test_a_checkpoint_of_another_program_is_taken_as_it_is(root):
    (root / "iter_0000020" / "megatron_dft.json").unlink()
    assert choose(root) == (20, "")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    assert choose(root) == (-1, "")


def test_old_checkpoints_are_deleted_and_the_new_one_never(tmp_path):
    from megatron_dft.recovery import commit, manifest

    for step in (1, 2, 3, 4, 9):
        _commit(tmp_path, step)
    (manifest.iteration_directory(tmp_path, 3) / manifest.FILE_NAME).unlink()  # a torso
    assert commit.delete_old(tmp_path, 2, 4) == [1, 3]
    assert manifest.iterations(tmp_path) == [2, 4, 9]
    assert commit.delete_old(tmp_path, 1, 4) == [2]
    assert manifest.iterations(tmp_path) == [4, 9]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from megatron_dft.recovery import commit, status

    path = tmp_path / "latest_checkpointed_iteration.txt"
    status.write_whole(path, "10")
    layer = commit._AtomicTracker(None)
    with pytest.raises(RuntimeError), layer.open(str(path), "w") as file:
        file.write("2")
        raise RuntimeError("killed here")
    assert path.read_text() == "10"
    with layer.open(str(path), "w") as file:
        file.write("20")
        assert path.read_text() == "10"
    assert path.read_text() == "20"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def killed(_):
        raise RuntimeError("killed here")

    monkeypatch.setattr(status.os, "fsync", killed)
    with pytest.raises(RuntimeError):
        status.write_whole(path, "30")
    assert path.read_text() == "20"


def test_another_loss_is_refused_unless_allowed_by_name(tiny_model, chats, tmp_path):
    where = dict(save=tmp_path / "c", load=tmp_path / "c", save_interval=1)

    def go(*more, **given):
        return run(
            1,
            *flags(tiny_model, chats, override_opt_param_scheduler=True, **where, **given),
            *more,
            status=tmp_path / "status",
        )

    assert go(loss="dft", train_iters=1).word == "finished"
    content = json.loads((tmp_path / "c/iter_0000001/megatron_dft.json").read_text())
    assert content["run"]["iteration"] == 1 and content["run"]["consumed_train_samples"] == 8
    refused = go(loss="sft", train_iters=2)
    assert refused.codes == [2] and refused.word == "refused" and not refused.steps
    assert "loss: name was 'dft', is 'sft'" in refused.texts[0]
    assert "--allow-change loss" in refused.texts[0]
    allowed = go("--allow-change", "loss", loss="sft", train_iters=2)
    assert allowed.word == "finished" and [s["step"] for s in allowed.steps] == [2]
    assert "warning: resuming with a change: loss: name was 'dft', is 'sft'" in allowed.texts[0]
