"""A step that does not load gives way to the one before; a manifest vouches for every file that the
checkpoint's own index names; two runs do not share a directory."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dft.recovery import manifest
from megatron_dft.storage import lock
from tests.ranks import run_ranks
from tests.recovery.runs import run
from tests.recovery.test_checkpoints import choose
from tests.storage.test_lock import HOLDER, ROOT
from tests.train.launch import flags

SHARDS = ("__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "__12_3.distcp")


def index(names=SHARDS) -> bytes:
    """As torch writes it: a pickle in which the names stand."""
    return pickle.dumps({("key", i): [name, 0, i] for i, name in enumerate(names)})


def step(root: Path, number: int, without=(), committed=True) -> Path:
    """A checkpoint directory of four shards, some of them gone before it was committed."""
    directory = manifest.iteration_directory(root, number)
    directory.mkdir(parents=True)
    for name in SHARDS:
        if name not in without:
            (directory / name).write_bytes(b"weights")
    (directory / ".metadata").write_bytes(index())
    (directory / "metadata.json").write_text("{}")
    if committed:
        files = manifest.describe(directory, manifest.files_of(directory, 0, 1))
        manifest.write(directory, files, {"identity": {}, "iteration": number})
    (root / manifest.TRACKER).write_text(str(number))
    return directory


def test_the_index_is_read_without_building_anything(tmp_path):
    directory = step(tmp_path, 1)
    assert manifest.named_files(directory) == set(SHARDS)
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (directory / ".metadata").write_bytes(bomb + index())
    assert manifest.unaccounted(directory, []) == sorted(SHARDS)
    assert not (tmp_path / "ran").exists()


def test_a_manifest_that_lacks_a_shard_vouches_for_nothing(tmp_path):
    """What two writers left: the files of the manifest are all as it says."""
    step(tmp_path, 10)
    step(tmp_path, 20, without=["__1_0.distcp"])
    outcome, message = choose(tmp_path)
    assert outcome == 10
    assert "iter_0000020: .metadata names __1_0.distcp, which megatron_dft.json does not" in message


def test_of_another_programs_steps_the_last_whole_one_is_taken(tmp_path):
    step(tmp_path, 10, committed=False)
    step(tmp_path, 20, committed=False, without=["__0_1.distcp"])
    outcome, message = choose(tmp_path)
    assert outcome == 10 and "iter_0000020: __0_1.distcp is missing" in message


def _commit(directory):
    from megatron_dft.recovery import commit

    try:
        commit.commit(directory, {"identity": {}})
    except RuntimeError as error:
        return str(error)


def test_a_save_whose_shard_is_gone_is_not_committed(tmp_path):
    directory = step(tmp_path, 10, committed=False, without=["__0_1.distcp"])
    first, second = run_ranks(_commit, 2, directory)
    assert first == second and "names __0_1.distcp" in first and "not committed" in first
    assert not (directory / manifest.FILE_NAME).exists()
    (directory / "__0_1.distcp").write_bytes(b"weights")
    assert run_ranks(_commit, 2, directory) == [None, None]
    assert (directory / manifest.FILE_NAME).exists()


def spoil(root: Path, number: int):
    """As the manifest says, but nothing that loads."""
    directory = manifest.iteration_directory(root, number)
    for shard in directory.glob("*.distcp"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    content = manifest.read(directory)
    manifest.write(
        directory, manifest.describe(directory, manifest.files_of(directory, 0, 1)), content["run"]
    )


def test_a_step_that_fails_to_load_gives_way(tiny_model, chats, tmp_path):
    """--save and --save-hf are links besides, one of them to nothing yet; both stay."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "c").symlink_to("disk/c")
    (tmp_path / "hf").symlink_to("disk/hf")
    (tmp_path / "disk/hf").mkdir()
    where = dict(save=tmp_path / "c", load=tmp_path / "c", save_interval=1)
    words = flags(tiny_model, chats, loss="dft", train_iters=3, save_hf=tmp_path / "hf", **where)
    status = tmp_path / "status"
    first = run(1, *words, status=status)
    assert first.word == "finished"
    for name in ("c", "hf"):
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "disk/hf/config.json").exists()
    assert not [p for p in tmp_path.rglob("*lock*")]
    spoil(tmp_path / "c", 3)
    again = run(1, *words, "--overwrite", status=status)
    assert again.word == "finished" and again.steps == first.steps[2:]
    assert "step 3 fails to load" in again.texts[0] and "passed over" in again.texts[0]
    assert "going on from step 2\n" in again.texts[0]
    # None is left: one line, and the tracker still names what was newest.
    for number in (1, 2, 3):
        spoil(tmp_path / "c", number)
    refused = run(1, *words, "--overwrite", status=status)
    assert refused.codes == [2] and refused.word == "refused" and not refused.rows
    assert "expected a whole checkpoint, got step 3 fails to load" in refused.texts[0]
    assert (tmp_path / "c" / manifest.TRACKER).read_text() == "3"


def test_a_second_run_is_refused_and_harms_nothing(tiny_model, chats, tmp_path):
    save = tmp_path / "c"
    words = flags(tiny_model, chats, loss="dft", train_iters=2, save=save, save_interval=1)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, save], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=os.environ | {"SLURM_JOB_ID": "77"},
    ) as holder:  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        refused = run(1, *words, status=tmp_path / "status")
        assert refused.codes == [2] and refused.word == "refused" and not refused.rows
        said = refused.texts[0].strip().splitlines()[-1]
        for word in ("error: --save:", str(save), f"process {holder.pid}", "job 77"):
            assert word in said
        assert [path.name for path in save.iterdir()] == [lock.NAME]
        holder.kill()
    assert run(1, *words, status=tmp_path / "status").word == "finished"


@pytest.mark.parametrize("place", [".metadata"])
def test_an_index_that_cannot_be_read_is_a_fault(place, tmp_path):
    step(tmp_path, 10)
    directory = step(tmp_path, 20)
    (directory / place).unlink()
    (directory / place).mkdir()
    outcome, _ = choose(tmp_path)
    assert outcome == 10
