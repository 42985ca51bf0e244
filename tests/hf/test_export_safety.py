"""An export is complete or absent: refusals, failures on one rank, kill -9 at four points."""

import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_dft.hf import directory as hf_directory
from megatron_dft.hf import export
from megatron_dft.hf.card import model_card
from megatron_dft.hf.load import load_hf_weights
from megatron_dft.hf.source import HFCheckpoint, open_checkpoint
from tests.hf import megatron_model
from tests.hf.test_round_trip import assert_same_bytes
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)


def models_for(directory: Path, tp: int = 1, pp: int = 1):
    megatron_model.start(tp, pp)
    checkpoint = open_checkpoint(directory)
    return load_hf_weights(megatron_model.build(directory), checkpoint), checkpoint


def save(directory: Path, out: Path, **kwargs):
    models, checkpoint = models_for(directory)
    export.save_hf(models, checkpoint, out, **kwargs)


def looks_whole(out: Path) -> bool:
    return out.exists() and any(out.iterdir())


def test_refuses_to_overwrite(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="--overwrite"):
        run_ranks(save, 1, tiny, out)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]
    run_ranks(save, 1, tiny, out, overwrite=True)
    assert_same_bytes(out, tiny)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (out / "mine.txt").exists()


def test_an_empty_directory_is_no_obstacle(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run_ranks(save, 1, tiny, out)
    assert_same_bytes(out, tiny)


def test_refuses_the_base_model_and_a_file(tiny, tmp_path):
    with pytest.raises(ValueError, match="base model"):
        run_ranks(save, 1, tiny, tiny, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run_ranks(save, 1, tiny, tmp_path / "file", overwrite=True)


def save_with_a_full_disk(directory: Path, out: Path):
    """The second pipeline stage's rank cannot write; both ranks must raise the same, at once."""
    models, checkpoint = models_for(directory, pp=2)
    if torch.distributed.get_rank() == 1:

        def full(*_):
            raise OSError(28, "No space left on device")

        export.Writer.write = full
    try:
        export.save_hf(models, checkpoint, out)
    except RuntimeError as error:
        return str(error)


def test_one_rank_that_cannot_write_stops_all(tiny, tmp_path):
    messages = run_ranks(save_with_a_full_disk, 2, tiny, tmp_path / "out")
    assert messages[0] == messages[1]
    assert "rank 1" in messages[0] and "No space left" in messages[0]
    assert not looks_whole(tmp_path / "out")


def save_elsewhere(directory: Path, out: Path):
    models, checkpoint = models_for(directory, tp=2)
    if torch.distributed.get_rank() == 1:
        hf_directory.staging_path = lambda _: Path("/not/shared")
    export.save_hf(models, checkpoint, out)


def test_a_directory_that_one_rank_does_not_see(tiny, tmp_path):
    with pytest.raises(ValueError, match="rank 1 does not see /not/shared"):
        run_ranks(save_elsewhere, 2, tiny, tmp_path / "out")


def lose_a_tensor(directory: Path, out: Path):
    """A table that forgets a parameter must not give a checkpoint that looks whole."""
    models, checkpoint = models_for(directory)
    shards = export.shards
    export.shards = lambda *a: (s for s in shards(*a) if "final_layernorm" not in s.name)
    export.save_hf(models, checkpoint, out)


def test_a_tensor_that_is_not_written(tiny, tmp_path):
    with pytest.raises(ValueError, match="'model.norm.weight' was not written"):
        run_ranks(lose_a_tensor, 1, tiny, tmp_path / "out")
    assert not looks_whole(tmp_path / "out")


def kill_at(module, name: str, call: int):
    """Replace module.name so that its `call`-th call ends this process as `kill -9` does."""
    original, calls = getattr(module, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, wrapper)


POINTS = {
    "in the middle of the weights": (export.Writer, "write", 7),
    "weights written, nothing else": (hf_directory, "_compare", 1),
    "before config.json": (hf_directory, "_write_config", 1),
    "before the rename": (hf_directory, "_replace", 1),
}


def save_until(directory: Path, out: Path, point: str):
    models, checkpoint = models_for(directory)
    kill_at(*POINTS[point])
    export.save_hf(models, checkpoint, out, overwrite=True)


@pytest.mark.parametrize("point", POINTS)
def test_kill_leaves_nothing_that_looks_whole(point, tiny, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TimeoutError):
        run_ranks(save_until, 1, tiny, out, point)
    assert not out.exists()
    with pytest.raises(ValueError):
        open_checkpoint(out)
    # The next export cleans up and succeeds; killed again, it leaves the finished one alone.
    run_ranks(save, 1, tiny, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(TimeoutError):
        run_ranks(save_until, 1, tiny, out, point)
    assert_same_bytes(out, tiny)


def test_overwrite_without_the_exchange(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_directory, "_exchange", lambda a, b: False)
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    hf_directory._replace(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "who").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def traced_save(directory: Path, out: Path) -> list[tuple[str, str]]:
    """(what, name) of every flush and rename of an export, in order."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(fd):
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        fsync(fd)

    def traced_rename(a, b):
        events.append(("rename", Path(b).name))
        rename(a, b)

    models, checkpoint = models_for(directory)
    os.fsync, os.rename = traced_fsync, traced_rename
    try:
        export.save_hf(models, checkpoint, out, card="a card")
    finally:
        os.fsync, os.rename = fsync, rename
    return events


def test_every_file_is_on_the_disk_before_the_rename_and_the_rename_after(tiny, tmp_path):
    out = tmp_path / "out"
    (events,) = run_ranks(traced_save, 1, tiny, out)
    at = events.index(("rename", "out"))
    before = {name for what, name in events[:at] if what == "flush"}
    written = {p.name for p in out.rglob("*")}
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= written
    assert before == written | {".out.incomplete"}
    assert events[at + 1 :] == [("flush", tmp_path.name)]


def test_card_states_method_data_and_figures(tiny):
    base = open_checkpoint(tiny)
    hub = HFCheckpoint(base.path, "org/model", "c0ffee", base.config, base.tensors)
    text = model_card(
        hub,
        objective="dft",
        parameters={"lr": 2e-5, "note": "a|b"},
        data={"train.jsonl": "abc123"},
        metrics={"lm loss": 1.23456789},
        command="torchrun -m megatron_dft.train --loss dft",
    )
    front = text.split("---")[1]
    assert "base_model: org/model" in front and "- dft" in front
    for expected in (
        "`c0ffee`",
        "2508.05629",
        "| lr | 2e-05 |",
        "| note | a\\|b |",
        "| train.jsonl | abc123 |",
        "| lm loss | 1.23457 |",
        "| megatron-core |",
        "torchrun -m megatron_dft.train --loss dft",
    ):
        assert expected in text, expected
    assert "base_model" not in model_card(base, objective="sft").split("---")[1]
