"""Faults of a job on the virtual cluster: its state and exit code, what was lost, what was said."""

import pytest

from tests.cluster.stories import HANG, SAVES, STEPS

pytestmark = pytest.mark.timeout(900)


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
