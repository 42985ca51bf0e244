"""Damaged headers, indices, configs and notes, drawn by the thousand."""

import hashlib
import json
import pickle
import time

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

INDEX = "model.safetensors.index.json"


LENGTHS = [pytest.param(40, id="slice"), pytest.param(1200, id="whole", marks=pytest.mark.slow)]


LIMIT = 20.0  # seconds: a reader that hangs, not a slow one


leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.text(max_size=5),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(10**9), 1e300, 0.5, "F32", "../x", "F8_E4M3"]),
)  # fmt: skip


_json = st.recursive(
    leaf,
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


def read_model(directory):
    from megatron_dft.drift.checkpoint import open_checkpoint as open_for_drift
    from megatron_dft.hf.config import megatron_args
    from megatron_dft.hf.source import open_checkpoint

    check(directory, lambda: megatron_args(open_checkpoint(directory)))
    check(directory, lambda: open_for_drift(directory).tensors)


class _Bytes:
    """A file's content that Hypothesis does not print."""

    def __init__(self, content):
        self.content = content

    def __repr__(self):
        return f"<{len(self.content)} bytes>"


def changed_table(whole, path, value):
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


def _manifest(directory):
    from megatron_dft.recovery import manifest

    manifest.read(directory)


def backend(directory):
    from megatron_dft.storage import torch_dist

    torch_dist.backend(directory)


def store(directory):
    from megatron_dft.data.store import TokenStore

    TokenStore.open(directory)


DATA = {"sources": [{"content": "ab", "weight": 1.0}], "seed": 1, "cut": "x"}


def _fingerprint(directory):
    from megatron_dft.data.fingerprint import check_resume

    check_resume(directory, DATA, False)


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
    "metadata.json": (backend, {"sharded_backend": "torch_dist", "sharded_backend_version": 1}),
    "meta.json": (
        store,
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
    "data_fingerprint.json": (_fingerprint, DATA),
    "scores.json": (
        _scores,
        {
            "version": 1,
            "data": DATA | {"seq_length": 64, "overlong": "drop"},
            "model": {"name": "m", "dtype": "fp32"},
            "borders": [[0, 2]],
            "tokens": 1,
            "sha256": "0" * 64,
        },
    ),
}
