"""--async-save: the writer hashes what it writes, and the commit hashes the rest alone."""

import hashlib
import multiprocessing
import pickle

import pytest
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_dft.recovery import commit, manifest, written_hashes
from megatron_dft.storage.files import PART
from tests.ranks import run_ranks

SHARDS = {"__0_0.distcp": b"a" * 100, "__0_1.distcp": b"b" * 10, "__1_0.distcp": b"c" * 7}


def write(directory, names):
    """Megatron's function in its writer process."""
    for name in names:
        (directory / name).write_bytes(SHARDS[name])


def _request(directory, rank):
    names = [name for name in SHARDS if name.startswith(f"__{rank}_")]
    request = AsyncRequest(write, (directory, names), [])
    return written_hashes.in_the_background(request, directory, rank, 2)


def _save(directory):
    """As Megatron does it: a process writes, the first rank adds the index, then the commit."""
    import torch.distributed as dist

    rank, hashed, digest = dist.get_rank(), [], manifest._digest
    request = _request(directory, rank)
    # A fork: the writer's tests.preload would be imported again by a spawned one.
    writer = multiprocessing.get_context("fork").Process(
        target=request.async_fn, args=request.async_fn_args
    )
    writer.start()
    writer.join()
    if rank == 0:
        (directory / ".metadata").write_bytes(b"__0_0.distcp __0_1.distcp __1_0.distcp")
    dist.barrier()
    manifest._digest = lambda path: hashed.append(path.name) or digest(path)
    commit.commit(directory, {"identity": {}})
    return hashed


def test_the_commit_hashes_no_shard(tmp_path):
    assert run_ranks(_save, 2, tmp_path) == [[".metadata"], []]
    files = manifest.read(tmp_path)["files"]
    assert {path.name for path in tmp_path.iterdir()} == {*files, manifest.FILE_NAME}
    for name, record in files.items():
        assert record["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert record["bytes"] == (tmp_path / name).stat().st_size
    assert {*SHARDS, ".metadata"} == set(files)


def test_a_writer_hashes_its_own_files_alone(tmp_path, monkeypatch):
    hashed, digest = [], manifest._digest
    monkeypatch.setattr(manifest, "_digest", lambda path: hashed.append(path.name) or digest(path))
    # What another rank's writer is about to give its name, and what lies there beside.
    passing = f".{manifest.HASHES}1.json.node.7{PART}"
    for name in (passing, "common.pt", "__1_0.distcp"):
        (tmp_path / name).write_bytes(b"x")
    _request(tmp_path, 0).async_fn(tmp_path, ["__0_0.distcp", "__0_1.distcp"])
    assert sorted(hashed) == ["__0_0.distcp", "__0_1.distcp"]
    assert passing not in {path.name for path in manifest.files_of(tmp_path, 0, 2)}


def test_a_rank_that_writes_nothing_and_a_writer_that_fails(tmp_path):
    nothing = AsyncRequest(None, (), [])
    assert written_hashes.in_the_background(nothing, tmp_path, 0, 1) is nothing
    failing = AsyncRequest(write, (tmp_path / "none", ["__0_0.distcp"]), [])
    request = written_hashes.in_the_background(failing, tmp_path, 0, 1)
    with pytest.raises(FileNotFoundError):
        request.async_fn(*request.async_fn_args)
    assert written_hashes.take(tmp_path, 0) == {}


def test_the_writer_is_sent_to_its_process(tmp_path):
    sent = pickle.loads(pickle.dumps(_request(tmp_path, 1).async_fn))
    sent(tmp_path, ["__1_0.distcp"])
    assert list(written_hashes.take(tmp_path, 1)) == ["__1_0.distcp"]
    assert not list(tmp_path.glob(manifest.HASHES + "*"))
