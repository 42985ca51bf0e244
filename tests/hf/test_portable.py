"""What a model card says of this machine: nothing; and the command in it runs on another."""

import shlex
from types import SimpleNamespace

import pytest

from megatron_dft.flags.output import check_base_model
from megatron_dft.hf.card import model_card
from megatron_dft.hf.portable import hub_name, portable
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.training import output


def base(path, name=None, revision=None) -> HFCheckpoint:
    return HFCheckpoint(path, name or str(path), revision, {}, {})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--save", "/mnt/joe/run 7/ckpt"], ["--save", "ckpt"]),
        (["--save=/mnt/joe/ckpt/"], ["--save=ckpt"]),
        (["--train-data", "0.7:/a/x.jsonl", "0.3,cap=9:~/b/y.jsonl"],
         ["--train-data", "0.7:x.jsonl", "0.3,cap=9:y.jsonl"]),
        (["/a/train.jsonl", "/b/train.jsonl"], ["a/train.jsonl", "b/train.jsonl"]),
        (["/a/ckpt", "/a/ckpt"], ["ckpt", "ckpt"]),
        (["../up/x.jsonl", "./y.jsonl", "runs/z"], ["x.jsonl", "y.jsonl", "runs/z"]),
        (["Qwen/Qwen2.5", "https://host/a/b", "1e-5", "a,b"],
         ["Qwen/Qwen2.5", "https://host/a/b", "1e-5", "a,b"]),
        (["/"], ["."]),
    ],
)  # fmt: skip
def test_paths_of_this_machine_become_their_ends(words, expected):
    assert portable(words) == expected


def test_a_model_s_directory_becomes_its_hub_name():
    given = ["--hf-model", "/m/qwen", "--reference-model=/m/qwen"]
    found = portable(given, {"/m/qwen": "Qwen/Qwen2.5-1.5B"})
    assert found == ["--hf-model", "Qwen/Qwen2.5-1.5B", "--reference-model=Qwen/Qwen2.5-1.5B"]


def test_the_hub_name_is_that_asked_for_or_that_of_the_cache(tmp_path):
    cached = tmp_path / "hub" / "models--org--my--model" / "snapshots" / "c0ffee"
    assert hub_name(base(cached)) == ("org/my--model", "c0ffee")
    assert hub_name(base(tmp_path, "org/model", "abc")) == ("org/model", "abc")
    assert hub_name(base(tmp_path / "org" / "model")) == (None, None)


def test_a_card_has_the_base_and_no_path(tmp_path):
    data = {"0.5:/home/joe/a/train.jsonl": "1", "0.5:/home/joe/b/train.jsonl": "2"}
    card = model_card(base(tmp_path / "secret" / "qwen"), objective="dft", data=data)
    assert "base_model" not in card and "Fine-tuned from `qwen` with" in card
    assert "| 0.5:a/train.jsonl | 1 |" in card and "| 0.5:b/train.jsonl | 2 |" in card
    assert "secret" not in card and "joe" not in card and str(tmp_path) not in card
    named = model_card(base(tmp_path / "qwen"), objective="dft", base_model="Qwen/Qwen2.5-1.5B")
    assert "base_model: Qwen/Qwen2.5-1.5B" in named and "from `Qwen/Qwen2.5-1.5B` with" in named
    cached = tmp_path / "models--org--m" / "snapshots" / "c0ffee"
    assert "from `org/m` at commit `c0ffee`" in model_card(base(cached), objective="dft")


@pytest.mark.parametrize(
    ("world", "local", "launch"),
    [
        (4, "4", "megatron-dft train --nproc-per-node 4"),
        (16, "8", "torchrun --nnodes 2 --nproc-per-node 8 -m megatron_dft.train"),
    ],
)
def test_the_command_of_a_card_is_one_to_run(tmp_path, monkeypatch, world, local, launch):
    model = tmp_path / "models--org--m" / "snapshots" / "c0ffee"
    words = ["/x/train.py", "--hf-model", str(model), "--train-data", f"{tmp_path}/my rows.jsonl"]
    monkeypatch.setattr("sys.argv", [*words, "--wandb-api-key", "geheim"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    args = SimpleNamespace(world_size=world, hf_base_model=None)
    command = output._command(args, base(model))
    start = shlex.split(launch)
    rest = ["--hf-model", "org/m", "--train-data", "my rows.jsonl", "--wandb-api-key", "***"]
    assert shlex.split(command) == start + rest


def test_a_name_that_no_hub_has_is_refused():
    check_base_model(None)
    check_base_model("Qwen/Qwen2.5-1.5B")
    for name in ("qwen", "/m/qwen", "a/b/c", "org/mo del"):
        with pytest.raises(ValueError, match="--hf-base-model: expected ORG/NAME"):
            check_base_model(name)
