"""Whole files, JSON, dtype words, trackers and tilings."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from megatron_dft.storage import files, torch_dist
from megatron_dft.storage.dtypes import WORDS, dtype_word, trained_word
from megatron_dft.storage.safetensors import read_header


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "deep" / "file"
    files.write_whole(path, "old")
    path.chmod(0o640)
    with pytest.raises(RuntimeError), files.whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o7777 == 0o640
    assert os.listdir(path.parent) == ["file"]
    import hashlib

    assert files.sha256_of_file(path) == hashlib.sha256(b"new").hexdigest()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 100_000, b"", b'{"a":1}x'])
def test_json_that_is_none_is_one_line(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is not JSON") as caught:
        files.read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"x\.json holds a JSON list"):
        files.read_json_object(tmp_path / "x.json")


def test_data_workers_need_no_torch():
    code = (
        "import sys, megatron_dft.storage.files, megatron_dft.data.cache; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_spelling_of_dtypes():
    assert [dtype_word(w) for w in ("fp32", "bfloat16", "float16")] == ["fp32", "bf16", "fp16"]
    assert WORDS[dtype_word("bfloat16")] is torch.bfloat16
    with pytest.raises(argparse.ArgumentTypeError, match="expected one of fp32, bf16, fp16"):
        dtype_word("int8")
    for bf16, fp16, word in ((True, False, "bf16"), (False, True, "fp16"), (False, False, "fp32")):
        assert trained_word(argparse.Namespace(bf16=bf16, fp16=fp16)) == word


@pytest.mark.parametrize("flag", ["--dtype", "--save-hf-dtype"])
def test_both_flags_take_it(flag):
    from megatron_dft.commands import export_hf
    from megatron_dft.flags import output

    parser = argparse.ArgumentParser()
    (export_hf if flag == "--dtype" else output).add_arguments(parser)
    rest = ["a", "b"] if flag == "--dtype" else []
    for given in ("bf16", "bfloat16"):
        assert vars(parser.parse_args([*rest, flag, given]))[flag[2:].replace("-", "_")] == "bf16"
    with pytest.raises(SystemExit):
        parser.parse_args([*rest, flag, "int8"])


def test_trackers(tmp_path):
    assert torch_dist.read_tracker(tmp_path) is None
    for text, value in (("12\n", "12"), ("release", "release")):
        (tmp_path / torch_dist.TRACKER).write_text(text)
        assert torch_dist.read_tracker(tmp_path) == value
    assert torch_dist.iteration_directory(tmp_path, "12").name == "iter_0000012"
    assert torch_dist.iteration_directory(tmp_path, "release").name == "release"
    for text in ("", "-1", "²", "9" * 5000, "../x", "1.0"):
        (tmp_path / torch_dist.TRACKER).write_text(text)
        with pytest.raises(ValueError, match="expected an iteration number") as caught:
            torch_dist.read_tracker(tmp_path)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "boxes, whole",
    [
        ([((0, 0), (2, 3))], True),
        ([((0, 0), (1, 3)), ((1, 0), (1, 2)), ((1, 2), (1, 1))], True),
        ([((0, 0), (1, 3))], False),  # a hole
        ([((0, 0), (2, 3)), ((1, 0), (1, 3))], False),  # twice
        ([((0, 0), (1, 3)), ((0, 0), (1, 3))], False),  # as many elements, one row twice
        ([((0, 0), (2, 2)), ((0, 2), (1, 1)), ((0, 2), (1, 1))], False),
        ([((0, 0), (2, 3)), ((2, 0), (0, 3))], False),  # an empty box
        ([], False),
    ],
)
def test_boxes_tile_a_tensor_or_do_not(boxes, whole):
    assert torch_dist.tiles((2, 3), boxes) is whole


def _write(path, entries, data):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "second, message",
    [
        ([0, 8], "overlaps"),
        ([4, 12], "overlaps"),
        ([12, 20], "leaves a gap"),
        ([8.0, 16.0], "data_offsets"),
        ([8, 16, 24], "data_offsets"),
    ],
)
def test_ranges_of_a_header(second, message, tmp_path):
    entry = {"dtype": "F32", "shape": [2]}
    entries = {"a": entry | {"data_offsets": [0, 8]}, "b": entry | {"data_offsets": second}}
    _write(tmp_path / "x", entries, bytes(20))
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "x")
    save_file({"a": torch.zeros(0, 3), "b": torch.ones(2)}, tmp_path / "y")  # the format allows it
    assert read_header(tmp_path / "y")["a"].nbytes == 0
