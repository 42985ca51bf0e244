"""`megatron-dft preflight`: bad nodes are found and named; good ones pass."""

import contextlib
import io

import pytest

from megatron_dft.cluster import node_checks
from megatron_dft.commands.preflight import judge
from tests.ranks import free_port, run_ranks
from tests.train.launch import flags


def _node(words, fault):
    import os

    from megatron_dft import cli

    if os.environ["RANK"] == "1" and fault == "torch":
        plain = node_checks.versions
        node_checks.versions = lambda: plain() | {"torch": "2.0"}
    if os.environ["RANK"] == "1" and fault == "file":
        node_checks.unreadable = lambda training: ["--train-data: x cannot be read"]
    node_checks.socket.gethostname = lambda: f"node{os.environ['RANK']}"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = cli.main(["preflight", *words])
    return status, said.getvalue()


def preflight(tmp_path, *training, fault=None, nodes=2, more=("--nodes-only",)):
    words = ["--run-dir", str(tmp_path), "--master-port", str(free_port()), "--procs-per-node", "2"]
    words += ["--need-gb", "0.001", *more, "--", "--device", "cpu", *training]
    results = run_ranks(_node, nodes, words, fault, init=False)
    assert not list(tmp_path.glob(".preflight*"))
    return [status for status, _ in results], results[0][1]


def test_good_nodes_pass(tmp_path, tiny_model, chats):
    """2 nodes of 2 ranks: the training command's own checks see four ranks."""
    training = flags(tiny_model, chats, tensor_model_parallel_size=4, micro_batch_size=1)
    status, table = preflight(tmp_path, *training, more=())
    assert status == [0, 0], table
    rows = [line.split() for line in table.splitlines()]
    assert [(row[0], row[-1]) for row in rows[1:3]] == [("node0", "ok"), ("node1", "ok")]
    assert "all-reduce between the nodes" in table and "bad nodes" not in table


def test_bad_nodes_are_named(tmp_path):
    status, table = preflight(tmp_path, fault="torch", nodes=3)
    assert status == [1, 1, 1]
    assert "torch 2.0, the others have" in table
    assert "sbatch --exclude node1)" in table
    status, table = preflight(tmp_path, fault="file")
    assert status == [1, 1] and "sbatch --exclude node1)" in table
    assert table.count("--train-data: x cannot be read") == 1


def test_a_path_that_no_node_can_read_is_the_jobs_fault(tmp_path):
    status, table = preflight(tmp_path, "--train-data", str(tmp_path / "absent.jsonl"))
    assert status == [2, 2] and "bad nodes" not in table
    assert table.splitlines()[-1] == (
        f"error: --train-data: {tmp_path}/absent.jsonl cannot be read on any node (the job's "
        "fault, no node's)"
    )


def test_what_training_would_refuse_is_refused(tmp_path, tiny_model, chats):
    training = flags(tiny_model, chats, tensor_model_parallel_size=3)
    status, table = preflight(tmp_path, *training, more=())
    assert status == [2, 2] and "bad nodes" not in table
    assert "error: --tensor-model-parallel-size 3" in table and "number of ranks, got 4" in table


def test_names_of_the_hub_are_no_paths(tmp_path):
    words = ["--train-data", "0.5:org/name", "0.5:org/name@train", "--hf-model", "org/model"]
    assert node_checks.unreadable(words) == []


def report(host, clock=0.0):
    return {"host": host, "clock": clock, "versions": {"torch": "1"}, "wrong": []}


def test_a_clock_that_is_off(tmp_path):
    found = judge([report("a"), report("b", 1.0), report("c", 60.0)])
    assert [r["wrong"] for r in found] == [[], [], ["its clock is +59 s off"]]


def test_missing_gpus_and_space_are_complaints(tmp_path):
    seen, wrong = node_checks.gpus(8)
    assert wrong == ([] if seen >= 8 else [f"{seen} GPUs, expected 8"])
    free, speed, wrong = node_checks.disk(tmp_path, 1e9)
    assert free > 0 and speed > 0 and "needed" in wrong[0]
    (tmp_path / "file").write_text("")
    assert node_checks.disk(tmp_path / "file", 1)[2]


@pytest.mark.parametrize(
    ("found", "bad"), [((), False), (("apex",), True), (("apex", "amp_C"), False)]
)
def test_the_other_apex_is_recognised(found, bad, monkeypatch):
    monkeypatch.setattr(
        node_checks.importlib.util, "find_spec", lambda name: object() if name in found else None
    )
    assert bool(node_checks.apex()) is bad
