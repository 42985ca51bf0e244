"""The real finetune.sbatch on a real Slurm of virtual nodes, training a tiny model on CPU."""

import pytest

from tests.cluster.runs import assert_same_tensors
from tests.cluster.slurm import ROOT, write_config
from tests.train.launch import flags, run_train

# Seconds, for a machine that others load too; nothing waits longer than it has to.
# Minutes each on a virtual cluster: `bash tests/run.sh -m slow tests/cluster`.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
STEPS = 40


def arguments(tiny_model, chats, **more):
    given = dict(loss="dft", train_iters=STEPS, save_interval=1000, seed=7)
    return flags(tiny_model, chats, **{**given, **more})


@pytest.fixture(scope="module")
def alone(tiny_model, chats):
    """Plain cross entropy of each step on one process."""
    return [step["lm loss"] for step in run_train(1, *arguments(tiny_model, chats))]


@pytest.fixture(scope="module")
def config(tiny_model, chats, data_cache, tmp_path_factory):
    import os

    directory = tmp_path_factory.mktemp("configs")

    def write(name, procs, settings=None, **more):
        return write_config(
            directory / f"{name}.sh",
            arguments(tiny_model, chats, **more),
            procs,
            os.environ["MEGATRON_DFT_DATA_CACHE"],
            **(settings or {}),
        )

    return write


@pytest.fixture(scope="module")
def uninterrupted(cluster, config, tmp_path_factory):
    """2 nodes × 2 ranks, TP 2 × DP 2, from start to end."""
    path = config("tp2dp2", 2, tensor_model_parallel_size=2)
    job = cluster.submit(path, tmp_path_factory.mktemp("runs") / "tp2dp2", 2)
    job.end = job.ended()
    return job


def agrees(job, alone):
    losses = job.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    # The progress line has four decimals.
    assert [losses[step] for step in sorted(losses)] == pytest.approx(alone, abs=1e-4)


def test_two_nodes_of_two_ranks_train_like_one_process(uninterrupted, alone):
    assert uninterrupted.end == ("COMPLETED", "0:0")
    assert uninterrupted.success
    agrees(uninterrupted, alone)
    leg = uninterrupted.run_dir / "legs" / "0"
    assert {"node.sh", "config.sh", "finetune.sbatch", "environment"} <= {
        path.name for path in leg.iterdir()
    }
    assert (uninterrupted.run_dir / "hf" / "config.json").exists()


def test_the_signal_ahead_of_the_limit_costs_nothing(cluster, config, uninterrupted, tmp_path):
    """Stop, save, requeue, resume: every loss and every tensor as without the interruption."""
    path = config("interrupted", 2, tensor_model_parallel_size=2)
    job = cluster.submit(path, tmp_path / "interrupted", 2)
    job.until(r"step 2/")
    job.signal_batch("USR1")
    job.until(r"requeueing: leg 0 ended with 'stopped'")
    assert not job.success
    assert job.ended() == ("COMPLETED", "0:0")
    assert job.show("Restarts") == "1"
    assert job.success
    saved = sorted(path.name for path in (job.run_dir / "checkpoints").glob("iter_*"))
    assert len(saved) == 2 and saved[-1] == f"iter_{STEPS:07d}"
    assert f"going on from step {int(saved[0][5:])}" in job.text()
    assert job.losses() == uninterrupted.losses()
    assert_same_tensors(*(j.run_dir / "checkpoints" / saved[-1] for j in (job, uninterrupted)))


def test_four_nodes_of_one_rank_train_like_one_process(cluster, config, alone, tmp_path):
    path = config("tp2pp2", 1, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    job = cluster.submit(path, tmp_path / "tp2pp2", 4)
    assert job.ended() == ("COMPLETED", "0:0")
    assert job.success
    agrees(job, alone)


def test_a_wrong_setting_fails_without_a_restart(cluster, config, tmp_path):
    path = config("wrong", 1)
    job = cluster.submit(path, tmp_path / "wrong", 1, "--lr", "0.1", "--keep-last", "0")
    assert job.ended() == ("FAILED", "2:0")
    assert job.show("Restarts") == "0"
    assert "--keep-last: expected at least 1 checkpoint" in job.text()
    assert not job.success


EXAMPLES = sorted((ROOT / "examples/configs").glob("*.sh"))
NODES = {"qwen2.5-32b": 4, "llama-3.1-70b": 4, "qwen3-30b-a3b": 2, "long-context": 2}


def test_slurm_accepts_every_example(cluster):
    """8 GPUs a node; the cluster has four nodes, so the 70B is asked for on four."""
    for path in EXAMPLES:
        if path.stem == "recipe":
            continue
        nodes = NODES.get(path.stem, 1)
        for script in ("finetune", "sweep"):
            done = cluster.run(
                "sbatch",
                "--test-only",
                f"--nodes={nodes}",
                f"examples/slurm/{script}.sbatch",
                str(path),
                TRAIN_DATA="x.jsonl",
                check=False,
            )
            assert done.returncode == 0, done.stderr
    refused = cluster.run("sbatch", "--test-only", "--nodes=5", "examples/slurm/finetune.sbatch",
                          str(EXAMPLES[0]), check=False)  # fmt: skip
    assert refused.returncode != 0
