"""A dry run refuses what the run would refuse, whoever planted it, and writes nothing."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from megatron_dft.commands.dry_run import needed_bytes
from tests.ranks import run_ranks
from tests.train.launch import flags


def _rank(words, world_size, free):
    import contextlib
    import io
    import shutil
    import sys

    from megatron_dft.commands import dry_run

    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    if free is not None:
        shutil.disk_usage = lambda path: SimpleNamespace(free=free)
    sys.argv = ["dry_run", *words]
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        status = dry_run.main()
    return status, said.getvalue(), wrong.getvalue()


def dry_run(words, world_size=1, free=None):
    (found,) = run_ranks(_rank, 1, words, world_size, free, init=False)
    return found


def test_a_run_that_would_start(tiny_model, chats, tmp_path):
    given = dict(train_iters=None, train_epochs=2, valid_data=chats, save=tmp_path / "ckpt")
    words = flags(tiny_model, chats, save_interval=5, tensor_model_parallel_size=2, **given)
    status, said, wrong = dry_run(words, world_size=4)
    assert status == 0
    assert wrong == (
        "warning: --valid-data: 48 of its 48 conversations are in --train-data too, and their loss "
        "tells nothing of others; take them out of one\n"
    )
    lines = [line for line in said.splitlines() if line.startswith("> ")]
    assert (
        lines[0] == "> loss: dft (arXiv 2508.05629), the default; --loss sft is plain cross entropy"
    )
    assert "> training data: 48 rows an epoch, 2 epochs" in lines and "> 12 steps" in lines
    assert "> evaluation: 48 rows of --valid-data, whole, every 10 steps and at the end" in lines
    assert lines[-1] == "> dry run: 4 ranks (TP 2 PP 1 CP 1) would start"
    assert not (tmp_path / "ckpt").exists()


def test_a_machine_without_a_gpu_says_for_whom_it_judged(tiny_model, chats):
    """No GPU here, nor transformer-engine: as on a login node."""
    words = [str(w) for w in flags(tiny_model, chats)]
    on_cpu = "> no GPU here: checked as the CPU run that it is; --device cuda"
    for device, expected in (("cpu", ""), ("auto", on_cpu)):
        status, said, _ = dry_run([*words, "--device", device])
        assert status == 0 and expected in said and ("no GPU" in said) == bool(expected)
    for_gpus = [*words, "--device", "cuda"]
    status, said, _ = dry_run([*for_gpus, "--require-fused-attention"])
    assert status == 0 and "> no GPU here: checked for GPU nodes" in said
    assert "nodes without it refuse the run: --require-fused-attention" in said
    for given, refused in (
        (["--use-cpu-initialization"], "--use-cpu-initialization: leaves the weights on the CPU"),
        (["--transformer-impl", "local", "--sequence-parallel", "--no-packing",
          "--tensor-model-parallel-size", "2"], "--sequence-parallel: is not in Megatron's own"),
    ):  # fmt: skip
        status, _, wrong = dry_run([*for_gpus, *given], world_size=2)
        assert status == 2 and refused in wrong, wrong


def _without(name):
    def plant(model, data):
        (model / name).unlink()

    return plant


def _template(model, data):
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")


def _bad_row(model, data):
    data.write_text(data.read_text() + json.dumps({"text": "x"}) + "\n")


FAULTS = {
    "layout": (None, dict(tensor_model_parallel_size=2), ["--tensor-model-parallel-size", "got 3"]),
    "weights": (_without("model.safetensors"), {}, ["safetensors"]),
    "tokenizer": (_without("tokenizer.json"), {}, ["tokenizer"]),
    "chat template": (_template, {}, ["chat template"]),
    "a bad row": (_bad_row, {}, ["chats.jsonl:49", "columns [text]"]),
    "data": (None, dict(train_data="absent.jsonl"), ["absent.jsonl", "does not exist"]),
    "no room": (None, dict(save="ckpt", save_interval=5, save_hf="out"),
                ["--save: about 0.0 GB", "has 0.0 GB free", "--keep-last"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "first_rows"),
    [*((case, ()) for case in FAULTS), ("a bad row", ("--check-rows", "49"))],
)
def test_what_the_run_would_refuse(case, first_rows, tiny_model, chats, tmp_path, monkeypatch):
    plant, given, words = FAULTS[case]
    monkeypatch.chdir(tmp_path)
    model, data = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(tiny_model, model)
    shutil.copy(chats, data)
    if plant is not None:
        plant(model, data)
    ranks, free = (3 if case == "layout" else 1), (1000 if case == "no room" else None)
    argv = [*flags(model, data, **given), *first_rows]
    status, _, wrong = dry_run([str(w) for w in argv], ranks, free)
    assert status == 2 and wrong.count("\n") == 1 and wrong.startswith("error: "), wrong
    for word in words:
        assert word in wrong, wrong


def test_the_first_rows_alone_are_read(tiny_model, chats, tmp_path):
    data = tmp_path / "chats.jsonl"
    shutil.copy(chats, data)
    _bad_row(None, data)
    status, said, _ = dry_run([*flags(tiny_model, data), "--check-rows", "48"])
    assert status == 0 and said.endswith("of the data the first 48 rows of each item were read\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"--save": 14_000, "--save-hf": 2_000}),
        (dict(bf16=False), {"--save": 12_000, "--save-hf": 2_000}),
        (dict(keep_last=2, no_save_optim=True), {"--save": 18_000, "--save-hf": 2_000}),
        (
            dict(save_hf_dtype="float32", save_hf_interval=4),
            {"--save": 14_000, "--save-hf": 12_000},
        ),
        (dict(save=None, save_hf=None), {}),
    ],
)
def test_what_a_run_of_a_thousand_parameters_writes(given, expected):
    values = dict(save="a", save_hf="b", bf16=True, fp16=False, no_save_optim=False, keep_last=None,
                  save_hf_dtype=None, save_hf_interval=None, train_iters=10)  # fmt: skip
    assert needed_bytes(SimpleNamespace(**values | given), 1000, 2000) == expected
