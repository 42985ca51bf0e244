"""The real finetune.sbatch on a real Slurm of virtual nodes trains as one process does, and of its
faults: a job's state and exit code, what was lost, what was said.

The jobs are in stories.py; what they are compared with runs on the fork server. All in one file: of
several pytest workers one has the cluster, of which there can be one.
"""

import shutil
import subprocess

import pytest

from tests.cluster.slurm import ROOT
from tests.cluster.stories import HANG, SAVES, STEPS, TP2_DP2, arguments
from tests.recovery.runs import assert_same_tensors, rows_of_steps, run

# For a machine that others load too; nothing waits longer than it has to.
pytestmark = pytest.mark.timeout(900)
ALL = list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def alone(tiny_model, chats, tmp_path_factory):
    """One process, from start to end."""
    return run(1, *arguments(tiny_model, chats), status=tmp_path_factory.mktemp("s") / "status")


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, chats, tmp_path_factory):
    """TP 2 × DP 2 from start to end, and its checkpoints."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    words = arguments(tiny_model, chats, save=directory / "c", **TP2_DP2)
    ended = run(4, *words, status=directory / "status")
    assert ended.word == "finished"
    ended.checkpoints = directory / "c"
    return ended


def figures(job, steps=ALL):
    """Those of each step; a step that was trained twice gave the same ones."""
    found = {}
    for one in job.figures():
        assert found.setdefault(one["step"], one) == one
    assert sorted(found) == steps
    return [found[step] for step in steps]


def close_to(expected):
    return [pytest.approx(one, rel=1e-4, abs=1e-6) for one in expected]


def test_the_jobs_are_under_way(stories):
    """Starts them all (conftest.py); those that wait for one come at the end of the suite."""
    assert stories.cluster.closed is False


def test_two_nodes_of_two_ranks_train_like_one_process(stories, alone):
    told = stories["interrupted"]
    assert told.end == ("COMPLETED", "0:0")
    assert told.job.success and not told.early
    assert figures(told.job) == close_to(alone.steps)
    assert rows_of_steps(told.job.rows()) == rows_of_steps(alone.rows)
    assert (told.job.run_dir / "hf" / "config.json").exists()
    for leg in ("0", "1", "2"):
        names = {path.name for path in (told.job.run_dir / "legs" / leg).iterdir()}
        assert {"node.sh", "config.sh", "finetune.sbatch", "environment"} <= names


def test_a_stop_and_the_death_of_a_rank_cost_no_bit(stories, uninterrupted):
    """Signal in step 2: saved there. kill -9 in step 6: back to 4. Then as if nothing had been."""
    job = stories["interrupted"].job
    assert job.ends() == ["stopped", "died", "finished"]
    assert job.resumed() == [2, SAVES] and job.show("Restarts") == "2"
    assert job.checkpoints() == [2, SAVES, STEPS]
    assert figures(job) == uninterrupted.steps
    assert job.rows() == uninterrupted.rows
    last = f"iter_{STEPS:07d}"
    assert_same_tensors(uninterrupted.checkpoints / last, job.run_dir / "checkpoints" / last)


def test_preflight_looked_at_every_node_before_each_leg(stories):
    text = stories["interrupted"].job.text()
    assert text.count("all-reduce between the nodes") == 3 and "bad nodes" not in text


def test_a_bad_node_is_named_and_no_rank_is_started(stories):
    told = stories["bad_node"]
    assert told.end == ("FAILED", "1:0")
    assert told.job.show("Restarts") == "0" and not told.job.success
    assert f"bad nodes: {told.bad} (leave them out" in told.job.text()
    assert "No space left on device" in told.job.text()
    assert "ROWS" not in told.job.text() and not told.job.ends()


def test_four_nodes_of_one_rank_train_like_one_process(stories, alone):
    told = stories["four_nodes"]
    assert told.end == ("COMPLETED", "0:0") and told.job.success
    losses = told.job.losses()
    assert sorted(losses) == ALL
    # The progress line has four decimals.
    expected = [step["lm loss"] for step in alone.steps]
    assert [losses[step] for step in ALL] == pytest.approx(expected, abs=1e-4)


def test_a_damaged_checkpoint_is_passed_over_and_another_layout_goes_on(stories, uninterrupted):
    """TP 2 × DP 2 → PP 2."""
    told = stories["other_layout"]
    assert told.end == ("COMPLETED", "0:0") and told.job.success
    assert told.job.resumed() == [SAVES]
    assert "latest_checkpointed_iteration.txt holds 'garbage'" in told.job.text()
    assert "does not have its checksum; passed over" in told.job.text()
    rest = [step for step in ALL if step > SAVES]
    assert figures(told.job, rest) == close_to(uninterrupted.steps[SAVES:])
    rows = rows_of_steps(uninterrupted.rows)
    assert rows_of_steps(told.job.rows()) == {step: rows[step] for step in rest}


def test_the_time_limit_itself(stories, alone):
    """Slurm's own signal; a second one may come where the machine is slow, and costs nothing."""
    told = stories["time_limit"]
    assert told.end == ("COMPLETED", "0:0") and told.job.success
    *stopped, last = told.job.ends()
    assert stopped and set(stopped) == {"stopped"} and last == "finished"
    assert "USR1: asking the ranks to stop" in told.job.text()
    assert told.job.resumed()[0] == 2
    assert figures(told.job) == alone.steps


EXAMPLES = sorted(
    set((ROOT / "examples/configs").glob("*.sh")) - {ROOT / "examples/configs/recipe.sh"}
)
NODES = {"qwen2.5-32b": 4, "llama-3.1-70b": 8, "qwen3-30b-a3b": 2, "long-context": 2}


@pytest.mark.parametrize("script", ["finetune", "sweep"])
@pytest.mark.parametrize("config", EXAMPLES, ids=lambda path: path.stem)
def test_slurm_accepts_every_example(config, script, cluster):
    """On nodes of 8 GPUs."""

    def test_only(nodes):
        words = ["sbatch", "--test-only", f"--nodes={nodes}", f"examples/slurm/{script}.sbatch"]
        return cluster.run(*words, str(config), TRAIN_DATA="x.jsonl", check=False)

    accepted = test_only(NODES.get(config.stem, 1))
    assert accepted.returncode == 0, accepted.stderr
    assert test_only(cluster.nodes + 1).returncode != 0
    command = ["bash", f"examples/slurm/{script}.sbatch", "--dry-run", str(config)]
    # Without the trainer's own checks, which want the model: test_job_script.py.
    shown = cluster.run(*command, TRAIN_DATA="x.jsonl", PYTHON="true").stdout
    assert "-m megatron_dft.train" in shown and "--hf-model" in shown


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_content():
    found = [*(ROOT / "examples").rglob("*.sh"), *(ROOT / "examples").rglob("*.sbatch")]
    assert len(found) > 10
    subprocess.run(["shellcheck", "-x", *found], check=True, cwd=ROOT)


def test_the_death_of_a_node_moves_the_job_to_others(stories):
    told = stories["lost_node_frozen_rank_cancelled"]
    assert told.killed not in told.later
    # It died in step 6.
    assert told.job.resumed()[0] == SAVES


def test_a_rank_that_stands_still_is_shown_and_ended(stories):
    job = stories["lost_node_frozen_rank_cancelled"].job
    text = job.text()
    assert f"error: rank 0: no progress for {HANG} s in step 6 (--hang-timeout)" in text
    assert "Current thread" in text
    assert "requeueing: leg 1 ended with 'hang' at step 4" in text
    assert job.resumed() == [SAVES, SAVES]


def test_a_cancelled_job_saves_and_is_not_requeued(stories):
    told = stories["lost_node_frozen_rank_cancelled"]
    assert told.end[0] == "CANCELLED"
    assert "ended by Slurm: cancelled" in told.job.text().split("FAULT hold in step 7")[1]
    assert told.job.show("Restarts") == "2" and not told.job.success
    assert told.job.checkpoints() == [SAVES, 7]


def test_a_full_disk_ends_the_job_and_spoils_nothing(stories):
    """The second checkpoint does not fit: three legs die in its save."""
    told = stories["full_disk"]
    assert told.end == ("FAILED", "70:0")
    assert "cannot be written, with 0 MiB free there" in told.job.text()
    assert told.job.ends() == ["died"] * 3 and told.job.resumed() == [SAVES, SAVES]
    assert "crash loop: 2 legs in a row without a new checkpoint (step 4)" in told.job.text()
    assert not told.job.success
    tracker = told.seen / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(SAVES)
    assert (told.seen / f"iter_{SAVES:07d}" / "megatron_dft.json").exists()
    assert not (told.seen / f"iter_{STEPS:07d}" / "megatron_dft.json").exists()


def test_a_crash_loop_is_stopped(stories):
    told = stories["crash_loop"]
    assert told.end == ("FAILED", "70:0")
    assert told.job.show("Restarts") == "2" and not told.job.success
    assert "crash loop: 3 legs in a row without a new checkpoint (step 0)" in told.job.text()


def test_a_wrong_setting_fails_without_a_restart(stories):
    told = stories["refused"]
    assert told.end == ("FAILED", "2:0")
    assert told.job.show("Restarts") == "0" and not told.job.success
    assert "--keep-last: expected at least 1 checkpoint" in told.job.text()
