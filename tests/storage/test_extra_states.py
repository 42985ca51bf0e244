"""Transformer Engine unpickles a layer's extra state: it is looked through before."""

import io
import pickle

import pytest
import torch

from megatron_dft.compat.safe_types import unsafe_extra_state
from tests.storage.hostile import PAYLOADS, Call, dotted


def as_bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.mark.parametrize("name", PAYLOADS)
def test_hostile_ones_are_named(name, tmp_path):
    mark = tmp_path / "ran"
    found = unsafe_extra_state([as_bytes(pickle.dumps({"recipe": PAYLOADS[name](mark)}))])
    # torch's own loader is in every pickled tensor, and weights_only in our processes.
    inside = name in ("torch's own loader",)
    assert (found is None) is inside and not mark.exists()
    assert inside or "which no checkpoint of Megatron needs" in found


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16])
def test_the_dtype_does_not_matter(dtype, tmp_path):
    mark = tmp_path / "ran"
    content = pickle.dumps(PAYLOADS["eval"](mark)) + bytes(4)
    whole = as_bytes(content[: len(content) // 4 * 4]).view(dtype)
    for state in (whole, whole.view(1, -1), torch.stack([whole, whole], 1)[:, 0]):
        assert "which no checkpoint of Megatron needs" in unsafe_extra_state([state])
    assert unsafe_extra_state([torch.tensor(7, dtype=dtype)])
    assert not mark.exists()


def test_dotted_names_and_garbage(tmp_path):
    assert "torch.serialization.os.system" in unsafe_extra_state([as_bytes(dotted(tmp_path / "x"))])
    recipes = "transformer_engine.common.recipe"
    text = b"".join(
        b"\x8c" + bytes([len(w)]) + w.encode() for w in (recipes, "os.system")
    )  # what that module imports
    hostile = b"\x80\x04" + text + b"\x93X\x02\x00\x00\x00id\x85R."
    assert "os.system" in unsafe_extra_state([as_bytes(hostile)])
    assert unsafe_extra_state([as_bytes(b"\x80\x04garbage")])


def test_what_is_written_is_taken():
    tensors = {"scale": torch.ones(3), "amax": torch.zeros(2, 3, dtype=torch.bfloat16)}
    state = {"recipe": None, "extra_fp8_variables": {"n": 1}, **tensors}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for kept in (as_bytes(pickle.dumps(state)), torch.empty(0, dtype=torch.uint8), buffer, None):
        assert unsafe_extra_state([kept]) is None
    # A recipe of Transformer Engine, by the name that it is pickled under.
    name = b"ctransformer_engine.common.recipe\nDelayedScaling\n)R."
    assert unsafe_extra_state([as_bytes(b"\x80\x02" + name)]) is None
    assert unsafe_extra_state([as_bytes(pickle.dumps(Call(print, "x")))])
