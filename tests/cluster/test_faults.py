"""Faults on the virtual cluster: the job's state and exit code, what was lost, what was said."""

import os
import re

import pytest

from tests.cluster.slurm import write_config
from tests.train.launch import flags

# Minutes each on a virtual cluster: `bash tests/run.sh -m slow tests/cluster`.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
STEPS, SAVES = 60, 10


@pytest.fixture
def submit(cluster, tiny_model, chats, data_cache, tmp_path):
    """Submit a run of STEPS steps that saves every SAVES; `settings` are the configuration's."""
    cluster.rest()

    def send(nodes, procs, *options, settings=None, **given):
        given = dict(loss="dft", train_iters=STEPS, save_interval=SAVES, seed=7) | given
        cache = os.environ["MEGATRON_DFT_DATA_CACHE"]
        path = write_config(
            tmp_path / "config.sh",
            flags(tiny_model, chats, **given),
            procs,
            cache,
            **(settings or {}),
        )
        return cluster.submit(path, tmp_path / "run", nodes, options=options)

    return send


def resumed_at(job):
    """Steps that the legs after the first went on from."""
    return [int(step) for step in re.findall(r"going on from step (\d+)", job.text())]


def goes_on_and_succeeds(job, reached):
    """Requeued, at most SAVES steps lost, finished, and every step was trained."""
    assert job.ended() == ("COMPLETED", "0:0")
    assert job.success and int(job.show("Restarts")) >= 1
    assert resumed_at(job) and resumed_at(job)[-1] > reached - SAVES
    assert sorted(job.losses()) == list(range(1, STEPS + 1))


def test_a_crash_loop_is_stopped(submit):
    job = submit(1, 1, settings={"PYTHON": "/bin/false"})
    assert job.ended() == ("FAILED", "70:0")
    assert job.show("Restarts") == "2"
    assert "crash loop: 3 legs in a row without a new checkpoint" in job.text()
    assert not job.success


@pytest.mark.slow
def test_the_death_of_a_node_moves_the_job_to_others(submit, cluster):
    job = submit(2, 1, tensor_model_parallel_size=2)
    job.until(rf"step {SAVES + 2}/")
    assert job.show("NodeList") == "n[1-2]"
    cluster.lab("kill-node", "n2")
    try:
        goes_on_and_succeeds(job, SAVES)
        assert "n2" not in job.show("NodeList")
    finally:
        cluster.lab("start-node", "n2")
        cluster.rest()
