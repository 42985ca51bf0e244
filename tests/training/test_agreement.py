"""Ranks that would train different runs say so in one line and end."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ranks import run_ranks
from tests.train.launch import flags


def _change_data(rank):
    if rank == 1:
        with open("chats.jsonl", "a") as file:
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
            file.write(json.dumps({"messages": messages}) + "\n")


def _change_rows(rank):
    """The data is the same; what the loader hands out is not."""
    if rank == 1:
        from megatron_dft.step import batch

        plain = batch.next_rows

        def next_rows(iterator, training):
            rows = plain(iterator, training)
            return rows | {"tokens": rows["tokens"].roll(1)}

        batch.next_rows = next_rows


def _rank(directories, argv, change):
    from megatron_dft import train

    rank = int(os.environ["RANK"])
    os.chdir(directories[rank])
    change(rank)
    with open("stderr", "w") as file, contextlib.redirect_stderr(file):
        try:
            status = train.main(argv)
        except SystemExit as leaving:
            status = leaving.code
    return status, Path("stderr").read_text()


CASES = {
    "data": (_change_data, "--train-data: expected the same on every rank"),
    "rows": (_change_rows, "rows of the first micro-batch: expected the same on every rank"),
}


@pytest.fixture
def places(tiny_model, chats, tmp_path):
    """A node of its own for each rank, with copies of model and data."""
    found = []
    for rank in range(2):
        directory = tmp_path / str(rank)
        shutil.copytree(tiny_model, directory / "model")
        shutil.copy(chats, directory / "chats.jsonl")
        found.append(str(directory))
    return found


@pytest.mark.parametrize("case", CASES)
def test_one_rank_that_differs_is_named(places, tmp_path, case):
    change, message = CASES[case]
    argv = flags("model", "chats.jsonl", train_iters=2, tensor_model_parallel_size=2)
    argv += ["--save", str(tmp_path / "save"), "--save-interval", "1"]
    results = run_ranks(_rank, 2, places, argv, change, init=False)
    assert [status for status, _ in results] == [2, 2]
    said = [line for _, text in results for line in text.splitlines() if "error: " in line]
    assert len(said) == 1 and message in said[0] and ";" in said[0], results
    assert not list((tmp_path / "save").glob("iter_*"))


WHAT = ("flags", "--hf-model", "software", "--valid-data", None)


def _compare():
    """what → the line of this rank where rank 2 of three has another value of it; "" for none."""
    from megatron_dft.training import agreement

    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"  # a node each
    found = {}
    for what in WHAT:
        differs = {name: rank == 2 and name == what for name in WHAT}
        agreement.version = lambda name, d=differs: "9.9" if d["software"] else "0.19.2"
        agreement.model_identity = lambda args, d=differs: {"weights": d["--hf-model"]}
        # The callback prints an address of its own on each rank.
        args = SimpleNamespace(
            hf_model="model", seed=77 if differs["flags"] else 1, rank=rank, callback=object()
        )
        data = {"--train-data": {"seed": 1}, "--valid-data": {"seed": differs["--valid-data"]}}
        try:
            agreement.check_start(args, data)
            found[what] = ""
        except ValueError as error:
            found[what] = str(error)
    return found


def test_whatever_differs_is_named():
    ranks = run_ranks(_compare, 3)
    assert ranks == [ranks[0]] * 3
    for what, line in ranks[0].items():
        if what is None:
            assert line == ""
        else:
            assert line.startswith(f"{what}: expected the same on every rank")
            assert "on rank 2 (" in line and "\n" not in line
