"""A checkpoint of somebody else is data: nothing that it says is run, whoever reads it.

Every payload of tests/storage/hostile.py touches a file where a plain `pickle.load` meets it, which
the first test shows; so the others cannot pass by a payload that does nothing.
"""

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.storage.hostile import (
    PAYLOADS,
    STEP,
    copy_of,
    dotted,
    replace_entry,
    table_of,
    write_table,
)
from tests.train.launch import flags


# Megatron puts a harmless function in the place of torch's own where it is imported.
@pytest.mark.parametrize("name", sorted(PAYLOADS.keys() - {"torch's own loader"}))
def test_the_payloads_are_live(name, tmp_path):
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(PAYLOADS[name](mark)))
    assert mark.exists()
    mark.unlink()
    pickle.loads(dotted(mark))
    assert mark.exists()


def places(table, payload):
    """The payload as the whole table, and in every part of a table that holds Python objects."""
    yield payload
    for name in ("planner_data", "storage_meta", "all_local_plans", "mcore_data"):
        yield _with(table, name, payload)
    yield _with(table, "storage_data", {**table.storage_data, "x": payload})


def _with(table, name, value):
    other = pickle.loads(pickle.dumps(table))
    setattr(other, name, value)
    return other


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", PAYLOADS)
def test_no_table_runs_anything(name, protocol, trained, tmp_path):
    from megatron_dft.hf.torch_dist import TorchDistReader

    mark, directory = tmp_path / "ran", tmp_path / STEP
    directory.mkdir()
    for hostile in places(table_of(trained), PAYLOADS[name](mark)):
        write_table(tmp_path, hostile, protocol)
        with pytest.raises(ValueError, match=r"\.metadata is not torch_dist metadata") as caught:
            TorchDistReader(directory)
        assert "\n" not in str(caught.value)
        assert not mark.exists()


def refused(content: bytes, directory: Path) -> str:
    from megatron_dft.storage.torch_dist import read_table

    directory.mkdir(exist_ok=True)
    (directory / ".metadata").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_table(directory)
    return str(caught.value)


def test_dotted_names_and_changed_classes(trained, tmp_path):
    from torch.distributed.checkpoint.metadata import MetadataIndex

    mark = tmp_path / "ran"
    assert "names torch.serialization.os.system" in refused(dotted(mark), tmp_path)
    assert not mark.exists()
    # BUILD on a class, not on an instance: the second half of the state is set as attributes.
    module, attribute = "torch.distributed.checkpoint.metadata", "MetadataIndex"
    text = b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, attribute))
    changes = b"\x80\x04" + text + b"\x93N}\x8c\x08__hash__Ns\x86b."
    before = MetadataIndex.__hash__
    assert "changes the class MetadataIndex" in refused(changes, tmp_path)
    assert MetadataIndex.__hash__ is before


def test_a_table_that_leads_elsewhere(trained, tmp_path):
    for path in ("../../etc/passwd", "/etc/passwd", "a/b", 5, "x\0y"):
        table = table_of(trained)
        next(iter(table.storage_data.values())).relative_path = path
        assert "in no file of the directory" in refused(pickle.dumps(table), tmp_path)


# ---- Megatron's own loading -----------------------------------------------------------------


def _common_states(directories):
    """What Megatron makes of each directory's common state."""
    from megatron.core import dist_checkpointing

    from megatron_dft.hf import skeleton

    answers = []
    with skeleton.single_process():
        for directory in directories:
            try:
                answers.append(sorted(dist_checkpointing.load_common_state_dict(str(directory))))
            except ValueError as error:
                answers.append(str(error))
    return answers


def _bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_no_common_state_runs_anything(trained, tmp_path):
    mark, directories = tmp_path / "ran", [trained / STEP]
    for number, payload in enumerate(PAYLOADS.values()):
        entry = copy_of(trained, tmp_path / f"entry{number}")
        replace_entry(entry, "common_state", _bytes([{"args": payload(mark)}]))
        older = copy_of(trained, tmp_path / f"older{number}")
        torch.save({"args": payload(mark)}, older / STEP / "common.pt")
        directories += [entry / STEP, older / STEP]
    good, *answers = run_ranks(_common_states, 1, directories, init=False)[0]
    assert "args" in good
    for directory, answer in zip(directories[1:], answers, strict=True):
        assert str(directory) in answer and "\n" not in answer, answer
        assert "which no checkpoint of Megatron needs; nothing of it was run" in answer
        assert ("common.pt" if "older" in str(directory) else "common_state") in answer
    assert not mark.exists()


# ---- the programs ---------------------------------------------------------------------------


def _answers(calls):
    """(status, standard error) of `megatron-dft` for each list of words."""
    import contextlib

    from megatron_dft import cli

    found = []
    for words in calls:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            found.append((cli.main(words), said.getvalue()))
    return found


def _hostile(trained, tmp_path, mark):
    """kind -> a --save directory: a hostile table, byte entries under a good one, common.pt."""
    table = copy_of(trained, tmp_path / "table")
    write_table(table, PAYLOADS["os.system"](mark))
    common = copy_of(trained, tmp_path / "common")
    replace_entry(common, "common_state", _bytes([{"args": PAYLOADS["eval"](mark)}]))
    older = copy_of(trained, tmp_path / "older")
    torch.save({"args": PAYLOADS["os.system"](mark)}, older / STEP / "common.pt")
    random = copy_of(trained, tmp_path / "random")
    replace_entry(random, "rng_state", _bytes([PAYLOADS["os.system"](mark)]))
    return {"table": table, "common": common, "older": older, "random": random}


@pytest.fixture
def attacked(trained, tmp_path):
    mark = tmp_path / "ran"
    yield _hostile(trained, tmp_path, mark)
    assert not mark.exists()


def test_export_and_drift(attacked, tiny_model, tmp_path):
    kinds = ("table", "common", "older")
    calls = [
        ["export", str(attacked[kind]), str(tmp_path / f"out-{kind}"), "--hf-model",
         str(tiny_model)]
        for kind in kinds
    ]  # fmt: skip
    calls += [["drift", str(tiny_model), str(attacked["table"]), "--out", str(tmp_path / "report")]]
    answers = run_ranks(_answers, 1, calls, init=False)[0]
    for (status, said), words in zip(answers, calls, strict=True):
        assert status == 2 and said.count("\n") == 1, said
        assert str(words[1] if words[0] == "export" else words[2]) in said, said
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(("out-", ".out-", "report"))]


class _Heard:
    """Standard error, and what was written to it."""

    def __init__(self, stream):
        self.stream, self.text = stream, ""

    def write(self, words):
        self.text += words
        return self.stream.write(words)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _started(program, argv, status):
    import importlib
    import os
    import sys

    os.environ["MEGATRON_DFT_STATUS"] = status
    sys.stderr = heard = _Heard(sys.stderr)
    try:
        code = importlib.import_module(f"megatron_dft.{program}").main(argv)
    except SystemExit as leaving:
        code = leaving.code
    return code, heard.text


def started(program, world_size, argv, tmp_path):
    """Status and standard error of each rank, and the word that the run left."""
    status = tmp_path / "status"
    ranks = run_ranks(_started, world_size, program, argv, str(status), init=False)
    assert [code for code, _ in ranks] == [2] * world_size, ranks
    said = "".join(text for _, text in ranks)
    assert said.count("error:") == 1 and "Traceback" not in said, said
    assert status.read_text().startswith("refused")
    return said


@pytest.mark.parametrize("kind", ["table", "common", "older"])
def test_train(kind, attacked, tiny_model, chats, tmp_path):
    argv = flags(tiny_model, chats, train_iters=2, load=attacked[kind])
    said = started("train", 1, argv, tmp_path)
    assert str(attacked[kind] / STEP) in said


def test_one_rank_of_two_reads_the_attack(attacked, tiny_model, chats, tmp_path):
    argv = flags(tiny_model, chats, train_iters=2, load=attacked["random"])
    argv += ["--tensor-model-parallel-size", "2"]
    said = started("train", 2, argv, tmp_path)
    assert "the entry 'rng_state/shard_0.1_" in said and ".distcp" in said


def test_score(attacked, tiny_model, chats, tmp_path):
    given = dict(lr=None, min_lr=None, train_iters=None, load=attacked["table"])
    argv = flags(tiny_model, chats, dft_reference_scores=tmp_path / "scores", **given)
    assert ".metadata is not torch_dist metadata" in started("score", 1, argv, tmp_path)


def test_other_formats_are_not_loaded(trained, tiny_model, chats, tmp_path):
    """Megatron would read mp_rank_00/model_optim_rng.pt of a directory without metadata.json."""
    save = copy_of(trained, tmp_path / "c")
    (save / STEP / "metadata.json").unlink()
    mark = tmp_path / "ran"
    (save / STEP / "mp_rank_00").mkdir()
    torch.save(PAYLOADS["os.system"](mark), save / STEP / "mp_rank_00" / "model_optim_rng.pt")
    shutil.copy(trained / "latest_checkpointed_iteration.txt", save)
    said = started("train", 1, flags(tiny_model, chats, train_iters=2, load=save), tmp_path)
    assert str(save) in said and not mark.exists()
