"""Damaged and hostile files: a one-line ValueError or what a whole file gives, and nothing written.

Mutations of files that are whole, so that most of a file is right and the reader goes deep. The
seed is fixed; the short runs are a slice of the slow ones.
"""

import functools
import hashlib
import json
import pickle
import shutil
import struct
import time

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

from tests.hf.tiny import make_tiny
from tests.storage.hostile import STEP

INDEX = "model.safetensors.index.json"
LENGTHS = [pytest.param(40, id="slice"), pytest.param(1200, id="whole", marks=pytest.mark.slow)]
LIMIT = 20.0  # seconds: a reader that hangs, not a slow one

_leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.text(max_size=5),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(10**9), 1e300, 0.5, "F32", "../x", "F8_E4M3"]),
)  # fmt: skip
_json = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
_deep = st.sampled_from([3, 100_000]).map(lambda n: "[" * n + "]" * n)


def _paths(value, before=()):
    """Every place in a JSON value."""
    yield before
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from _paths(inner, (*before, key))


def _replaced(value, path, new):
    if not path:
        return new
    copied = value.copy()
    if new is DROP and len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copied


DROP = object()


def mutations(value):
    """JSON texts: `value` with something else at up to three places, or with text damaged."""
    change = st.tuples(st.sampled_from([p for p in _paths(value) if p]), _json | st.just(DROP))

    def apply(changes):
        changed = value
        for path, new in changes:
            try:
                changed = _replaced(changed, path, new)
            except (KeyError, IndexError, TypeError, AttributeError):
                continue  # an earlier change took that place away
        return json.dumps(changed).encode("utf-8", "surrogatepass")

    return st.lists(change, min_size=1, max_size=3).map(apply) | _deep.map(str.encode)


def damages(content):
    """Bytes of a file with some of them changed, taken away or added."""
    place = st.integers(0, len(content))
    edit = st.tuples(place, st.integers(0, 6), st.binary(max_size=6))

    def apply(edits):
        changed = content
        for begin, length, new in edits:
            changed = changed[:begin] + new + changed[begin + length :]
        return changed

    return st.lists(edit, min_size=1, max_size=4).map(apply)


def check(directory, read):
    """`read()` gives something or one line of ValueError, soon, and writes no file."""
    before, began = sorted(directory.rglob("*")), time.monotonic()
    try:
        read()
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, error
    assert time.monotonic() - began < LIMIT
    assert sorted(directory.rglob("*")) == before


def fuzz(examples, strategy, test):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=quiet,
    )(given(strategy)(test))  # fmt: skip
    run()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("qwen3-moe", tmp_path_factory.mktemp("fuzz") / "hf", num_hidden_layers=2)


def _read_model(directory):
    from megatron_dft.drift.checkpoint import open_checkpoint as open_for_drift
    from megatron_dft.hf.config import megatron_args
    from megatron_dft.hf.source import open_checkpoint

    check(directory, lambda: megatron_args(open_checkpoint(directory)))
    check(directory, lambda: open_for_drift(directory).tensors)


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
        _read_model(tmp_path)

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
        _read_model(tmp_path)

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
        _read_model(directory)
        check(directory, lambda: model_shape.shape_of(model_shape.read_config(str(directory))))

    fuzz(examples, mutations(json.loads(content)) | damages(content), test)


class _Bytes:
    """A file's content that Hypothesis does not print."""

    def __init__(self, content):
        self.content = content

    def __repr__(self):
        return f"<{len(self.content)} bytes>"


def _changed_table(whole, path, value):
    """A table with one attribute of one of its objects replaced."""
    table = pickle.loads(whole.content)
    entries = list(table.state_dict_metadata.values())
    places = list(table.storage_data.values())
    tensors = [e for e in entries if hasattr(e, "chunks")]
    owners = [table, tensors[0], tensors[0].properties, tensors[0].chunks[0], places[0]]
    owner = owners[path % len(owners)]
    names = sorted(vars(owner).keys() - {"memory_format"})  # torch cannot pickle another
    object.__setattr__(owner, names[path % len(names)], value)
    return pickle.dumps(table)


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
        functools.partial(_changed_table, _Bytes(content)), st.integers(0, 60), values
    )
    fuzz(examples, damages(content) | changed, test)


def _manifest(directory):
    from megatron_dft.recovery import manifest

    manifest.read(directory)


def _backend(directory):
    from megatron_dft.storage import torch_dist

    torch_dist.backend(directory)


def _store(directory):
    from megatron_dft.data.store import TokenStore

    TokenStore.open(directory)


_DATA = {"sources": [{"content": "ab", "weight": 1.0}], "seed": 1, "cut": "x"}


def _fingerprint(directory):
    from megatron_dft.data.fingerprint import check_resume

    check_resume(directory, _DATA, False)


def _scores(directory):
    from megatron_dft.data.reference_scores import ReferenceScores

    ReferenceScores(directory)


ARRAYS = {"tokens.u32": 0, "offsets.i64": 8, "rows.i64": 0, "files.i32": 0}
# file -> (what reads it, what it holds)
SMALL = {
    "megatron_dft.json": (
        _manifest,
        {"version": 1, "files": {"a": {"bytes": 1, "sha256": "0"}}, "run": {"identity": {}}},
    ),
    "metadata.json": (_backend, {"sharded_backend": "torch_dist", "sharded_backend_version": 1}),
    "meta.json": (
        _store,
        {
            "paths": ["x"],
            "counts": {"rows": 1},
            "bytes": ARRAYS,
            "sha256": {
                name: hashlib.sha256(bytes(size)).hexdigest() for name, size in ARRAYS.items()
            },
            "largest_id": -1,
        },
    ),
    "data_fingerprint.json": (_fingerprint, _DATA),
    "scores.json": (
        _scores,
        {
            "version": 1,
            "data": _DATA | {"seq_length": 64, "overlong": "drop"},
            "model": {"name": "m", "dtype": "fp32"},
            "borders": [[0, 2]],
            "tokens": 1,
            "sha256": "0" * 64,
        },
    ),
}


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
