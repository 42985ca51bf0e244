"""The tokenised cache: whole or absent, keyed by content, the same for any number of processes."""

import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_dft.data import cache, prepare, verified
from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.reading import Reading
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.cached import prepared, same_store, some_rows
from tests.data.fixtures import chat, chatml_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture
def parallel(monkeypatch):
    """Small batches, and processes whatever the size."""
    monkeypatch.setattr(prepare, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr("megatron_dft.data.readers.BATCH_ROWS", 16)


def _flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_memory_disk_and_processes_give_the_same_store(tmp_path, tokenizer, monkeypatch, parallel):
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(200))
    (one,) = prepared([path], tokenizer, None, workers=1)
    (many,) = prepared([path], tokenizer, tmp_path / "c", workers=3)
    assert len(one) == 200 and same_store(one, many) and one.meta["counts"] == many.meta["counts"]
    assert one.where(7) == f"{path}:8"
    monkeypatch.setattr(prepare, "_blocks", None)
    (again,) = prepared([path], tokenizer, tmp_path / "c")
    assert same_store(one, again)


def test_the_first_bad_row_of_the_file_is_named_whoever_meets_it_first(
    tmp_path, tokenizer, parallel
):
    rows = some_rows(400)
    # The early one sits in a batch of long rows, so that a later batch is done before it.
    rows[40]["messages"] = chat("no answer")
    for i in range(32, 48):
        rows[i]["messages"][0]["content"] += " long" * 5000
    rows[41 + 16]["messages"] = chat("none either")
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a.jsonl:41: it has no assistant turn"):
        prepared([path], tokenizer, tmp_path / "c", workers=4)
    assert not list((tmp_path / "c" / "tokens").glob("*/meta.json"))
    assert not list((tmp_path / "c" / "tokens").glob(".*.partial"))
    (store,) = prepared([path], tokenizer, tmp_path / "c", workers=4, errors="skip", max_bad_rows=2)
    assert len(store) == 398 and store.meta["counts"]["bad_rows"] == 2
    assert [b.split(": ")[0] for b in prepare.bad_rows(store)] == [f"{path}:41", f"{path}:58"]
    # What one run may leave out another may not: the cache does not hide it.
    with pytest.raises(ValueError, match=r"a.jsonl:41: it has no assistant turn"):
        prepared([path], tokenizer, tmp_path / "c")


def test_the_cache_goes_by_content(tmp_path, tokenizer):
    rows = some_rows(5)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    spec = encoder_spec(tokenizer)

    def key(where, spec=spec, data_format=None):
        return cache.store_parts(
            parse_sources([where])[0], spec, Reading(data_format), tmp_path / "c"
        )

    first = key(path)
    assert key(write_jsonl(tmp_path / "copy.jsonl", rows)) == first
    rows[3]["messages"][1]["content"] += "."
    assert key(write_jsonl(tmp_path / "other.jsonl", rows)) != first
    assert key(path, data_format="messages") != first
    assert key(path, encoder_spec(tokenizer, template_args={"a": 1})) != first
    assert key(path, encoder_spec(tokenizer, template_date="2024-01-01")) != first
    assert key(path, encoder_spec(tokenizer, rewrites="refuse")) != first
    other = chatml_tokenizer()
    other.chat_template += "{# changed #}"
    assert key(path, encoder_spec(other)) != first
    more = chatml_tokenizer()
    more.add_tokens(["zzz"])
    assert key(path, encoder_spec(more)) != first


def test_a_file_that_changes_is_hashed_again(tmp_path, monkeypatch):
    path, notes = tmp_path / "a.jsonl", tmp_path / "c"
    path.write_text("1")
    first = cache.content_hash(path, notes)
    assert not (notes / "hashes").exists(), "a file this young may still change"
    old = time.time() - 100
    os.utime(path, (old, old))
    assert cache.content_hash(path, notes) == first and not (notes / "hashes").exists()
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1.0)  # as if it had lain there for long
    assert cache.content_hash(path, notes) == first and list((notes / "hashes").iterdir())
    path.write_text("2")
    os.utime(path, (old, old))  # same name, size, inode and time of writing
    assert cache.content_hash(path, notes) != first


def test_a_killed_tokenisation_leaves_nothing_that_looks_whole(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(50))
    (tmp_path / "spec").write_bytes(pickle.dumps(encoder_spec(tokenizer)))
    program = (
        "import os, pickle\n"
        "from megatron_dft.data import store\n"
        "add = store.StoreWriter.add\n"
        "def killed(self, block):\n"
        "    add(self, block)\n"
        "    [f.flush() for f in self._files.values()]\n"
        "    os.kill(os.getpid(), 9)\n"
        "store.StoreWriter.add = killed\n"
        "from megatron_dft.data.prepare import PrepareOptions, prepare\n"
        "from megatron_dft.data.sources import parse_sources\n"
        f"spec = pickle.load(open({str(tmp_path / 'spec')!r}, 'rb'))\n"
        f"options = PrepareOptions(cache_dir={str(tmp_path / 'c')!r})\n"
        f"prepare(parse_sources([{path!r}]), spec, options)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    left = list((tmp_path / "c" / "tokens").glob(".*.partial"))
    assert len(left) == 1 and (left[0] / "tokens.u32").stat().st_size > 0
    assert not list((tmp_path / "c" / "tokens").glob("*/meta.json"))
    data = build_dataset(
        [path], tokenizer, DatasetOptions(seq_length=256, cache_dir=tmp_path / "c")
    )
    assert len(data.conversations) == 50
    assert not list((tmp_path / "c" / "tokens").glob(".*.partial")), "swept up"


def test_a_damaged_store_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(5))
    (store,) = prepared([path], tokenizer, tmp_path / "c")
    tokens = next((tmp_path / "c" / "tokens").glob("*/tokens.u32"))
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"is damaged: tokens.u32 has .* delete the directory"):
        prepared([path], tokenizer, tmp_path / "c")


@pytest.mark.parametrize(
    "name", ["tokens.u32", "offsets.i64", "rows.i64", "files.i32", "weights.f32"]
)
def test_a_store_whose_content_changed_is_refused(tmp_path, tokenizer, name):
    rows = some_rows(5)
    rows[2]["weight"] = 0.5
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prepared([path], tokenizer, tmp_path / "c")
    file = next((tmp_path / "c" / "tokens").glob(f"*/{name}"))
    status = os.stat(file)
    _flip(file, 5)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match=f"is damaged: {name} does not have the content that was"):
        prepared([path], tokenizer, tmp_path / "c")


def test_offsets_beyond_the_tokens_are_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(5))
    prepared([path], tokenizer, tmp_path / "c")
    file = next((tmp_path / "c" / "tokens").glob("*/offsets.i64"))
    offsets = np.fromfile(file, dtype="<i8")
    offsets[2] = 10**12
    offsets.tofile(file)
    with pytest.raises(ValueError, match="is damaged: offsets.i64"):
        prepared([path], tokenizer, tmp_path / "c")


def test_a_store_is_hashed_once_on_each_node(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(5))
    prepared([path], tokenizer, tmp_path / "c")
    hashed = []
    digest = verified.sha256_of_file
    monkeypatch.setattr(verified, "sha256_of_file", lambda path: hashed.append(1) or digest(path))
    monkeypatch.setattr(cache, "content_hash", lambda path, notes: "same")
    monkeypatch.setattr(cache, "digest", lambda value: "same")
    prepared([path], tokenizer, tmp_path / "d")
    hashed.clear()
    prepared([path], tokenizer, tmp_path / "d")
    assert not hashed, "who wrote it knows it"
    monkeypatch.setattr(verified.socket, "gethostname", lambda: "another-node")
    prepared([path], tokenizer, tmp_path / "d")
    prepared([path], tokenizer, tmp_path / "d")
    assert len(hashed) == 4, "four files, once"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bytes": 3}', "[" * 100_000])
def test_a_damaged_meta_is_one_line(tmp_path, tokenizer, text):
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(5))
    prepared([path], tokenizer, tmp_path / "c")
    next((tmp_path / "c" / "tokens").glob("*/meta.json")).write_text(text)
    with pytest.raises(ValueError, match="is damaged: meta.json .* delete the directory"):
        prepared([path], tokenizer, tmp_path / "c")


@pytest.mark.parametrize("step", ["add", "finish"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tokenizer, monkeypatch, step):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"megatron_dft.data.store.StoreWriter.{step}", full)
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(5))
    with pytest.raises(ValueError, match="--data-cache: .* No space left on device; choose"):
        prepared([path], tokenizer, tmp_path / "c")
    assert not [p for p in (tmp_path / "c" / "tokens").iterdir() if p.suffix != ".lock"]
