"""A process without progress shows its stacks and ends; one with progress goes on."""

import subprocess
import sys

SCRIPT = """
import threading, time
from megatron_dft.recovery.watchdog import Watchdog
dog = Watchdog({limit})
dog.start()
dog.progress("step 7")
def stuck_in_a_collective():
    threading.Event().wait({wait})
stuck_in_a_collective()
dog.stop()
print("went on", flush=True)
"""


def outcome(limit, wait, tmp_path):
    status = tmp_path / "status"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(limit=limit, wait=wait)],
        capture_output=True,
        text=True,
        env={"MEGATRON_DFT_STATUS": str(status), "RANK": "3"},
    )
    return done, status.read_text() if status.exists() else None


def test_a_hang_is_shown_and_ended(tmp_path):
    done, status = outcome(0.2, 600, tmp_path)
    assert done.returncode == 69 and status == "hang step 7\n"
    assert "rank 3: no progress for 0.2 s in step 7" in done.stderr
    assert "stuck_in_a_collective" in done.stderr


def test_progress_is_left_alone(tmp_path):
    done, status = outcome(600, 0.01, tmp_path)
    assert done.returncode == 0 and done.stdout == "went on\n" and status is None
