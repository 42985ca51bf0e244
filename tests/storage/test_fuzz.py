"""Damaged and hostile files: a one-line ValueError or what a whole file gives, and nothing written.

Mutations of files that are whole, so that most of a file is right and the reader goes deep. The
seed is fixed; the short runs are a slice of the slow ones.
"""

import functools
import json
import shutil
import struct

import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import save_file

from tests.hf.tiny import make_tiny
from tests.storage.hostile import STEP
from tests.storage.malformed import (
    ARRAYS,
    INDEX,
    LENGTHS,
    SMALL,
    _Bytes,
    _fingerprint,
    _json,
    changed_table,
    check,
    damages,
    fuzz,
    mutations,
    read_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("qwen3-moe", tmp_path_factory.mktemp("fuzz") / "hf", num_hidden_layers=2)


@pytest.mark.parametrize("examples", LENGTHS)
def test_headers(examples, tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").unlink()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')

    def with_header(text):
        return struct.pack("<Q", len(text)) + text + data

    def test(written):
        (tmp_path / "model.safetensors").write_bytes(written)
        read_model(tmp_path)

    (tmp_path / "model.safetensors").write_bytes(b"")
    fuzz(examples, mutations(header).map(with_header) | damages(content), test)


@pytest.mark.parametrize("examples", LENGTHS)
def test_indices(examples, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "b.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}

    def test(written):
        (tmp_path / INDEX).write_bytes(written)
        read_model(tmp_path)

    (tmp_path / INDEX).write_bytes(b"")
    fuzz(examples, mutations(index) | damages(json.dumps(index).encode()), test)


@pytest.mark.parametrize("examples", LENGTHS)
def test_configs(examples, model, tmp_path):
    from megatron_dft.cluster import model_shape

    directory = tmp_path / "m"
    shutil.copytree(model, directory)
    file = directory / "config.json"
    content = file.read_bytes()

    def test(written):
        file.write_bytes(written)
        read_model(directory)
        check(directory, lambda: model_shape.shape_of(model_shape.read_config(str(directory))))

    fuzz(examples, mutations(json.loads(content)) | damages(content), test)


@pytest.mark.parametrize("examples", LENGTHS)
def test_tables(examples, trained, tmp_path):
    from megatron_dft.hf.torch_dist import TorchDistReader

    content = (trained / STEP / ".metadata").read_bytes()
    directory = tmp_path / STEP
    directory.mkdir()
    for file in (trained / STEP).iterdir():
        if file.suffix in (".distcp", ".json"):
            (directory / file.name).symlink_to(file)
    (directory / ".metadata").write_bytes(b"")

    def read():
        reader = TorchDistReader(directory)
        for key in sorted(reader.keys()):
            if reader.shape(key) is not None:
                next(iter(reader.chunks(key)), None)

    def test(written):
        from megatron_dft.drift.checkpoint import open_checkpoint

        (directory / ".metadata").write_bytes(written)
        check(directory, read)
        check(directory, lambda: open_checkpoint(directory).tensors)

    values = _json | st.sampled_from([torch.Size([2, -1]), torch.Size([0]), torch.int8, (1, 2)])
    changed = st.builds(
        functools.partial(changed_table, _Bytes(content)), st.integers(0, 60), values
    )
    fuzz(examples, damages(content) | changed, test)


@pytest.mark.parametrize("examples", LENGTHS)
@pytest.mark.parametrize("name", SMALL)
def test_small_files(name, examples, tmp_path):
    """Manifests, metadata.json, the token cache, records of the data, stored scores."""
    from megatron_dft.data import fingerprint

    read, value = SMALL[name]
    file = tmp_path / (fingerprint.FILE_NAME if read is _fingerprint else name)
    for array, size in ARRAYS.items():
        (tmp_path / array).write_bytes(bytes(size))
    (tmp_path / "scores.f32").write_bytes(bytes(4))
    text = json.dumps(value).encode()
    file.write_bytes(text)
    read(tmp_path)  # whole, it is taken

    def test(written):
        file.write_bytes(written)
        check(tmp_path, lambda: read(tmp_path))

    fuzz(max(examples // 4, 10), mutations(value) | damages(text), test)


@pytest.mark.parametrize("examples", LENGTHS)
def test_notes_of_hashes(examples, tmp_path, monkeypatch):
    """A damaged note never gives another hash, and never an error."""
    from megatron_dft.data import cache

    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1.0)
    right = cache.content_hash(data, tmp_path)
    (note,) = (tmp_path / "hashes").iterdir()
    text = note.read_bytes()
    identity = json.loads(text)["identity"]

    def test(written):
        note.write_bytes(written)
        try:
            known = json.loads(written)
            forged = known["identity"] == identity and len(known["sha256"]) == 64
        except (ValueError, RecursionError, KeyError, TypeError):
            forged = False
        assert forged or cache.content_hash(data, tmp_path) == right

    fuzz(max(examples // 4, 10), mutations(json.loads(text)) | damages(text), test)
