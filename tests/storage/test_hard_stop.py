"""A pickle that takes for ever in one operation ends the process that reads it, and says where."""

import io
import pickle
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_dft.storage.hard_stop import hard_stop


def tower(levels: int = 64) -> bytes:
    """A dict whose key is a tuple of twice a tuple of twice …, in 400 bytes."""
    value: tuple = ("a",)
    for _ in range(levels):
        value = (value, value)
    # Nothing that hashes it can be built here: the dict round it is written by hand.
    head, body = pickle.dumps(value, 2)[:2], pickle.dumps(value, 2)[2:-1]
    return head + pickle.EMPTY_DICT + body + pickle.NONE + pickle.SETITEM + pickle.STOP


_TABLE = """
import sys
from pathlib import Path
from megatron_dft.storage import safe_pickle, torch_dist
safe_pickle._SECONDS = 0.3
torch_dist.read_table(Path(sys.argv[1]))
"""
_ENTRY = """
import sys
import torch
from megatron_dft.compat import safe_load
safe_load._SECONDS = 0.3
safe_load.install()
torch.load(sys.argv[1] + "/entry")
"""


def write_entry(file: Path) -> None:
    """As torch.save writes objects: an archive with the pickle in it."""
    saved = io.BytesIO()
    torch.save({}, saved)
    with zipfile.ZipFile(saved) as before, zipfile.ZipFile(file, "w") as after:
        for name in before.namelist():
            after.writestr(name, tower() if name.endswith("data.pkl") else before.read(name))


@pytest.mark.parametrize("program", [_TABLE, _ENTRY])
def test_the_process_ends_and_the_stack_is_shown(program, tmp_path):
    (tmp_path / ".metadata").write_bytes(tower())
    write_entry(tmp_path / "entry")
    words = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGPROF
    assert "load" in ended.stderr


def armed() -> bool:
    return signal.getitimer(signal.ITIMER_PROF)[0] > 0


def test_no_clock_is_left_behind():
    assert not armed()
    first, second = threading.Event(), threading.Event()

    def outer():
        with hard_stop(1000):
            first.set()
            second.wait()

    thread = threading.Thread(target=outer)
    thread.start()
    first.wait()
    with hard_stop(2000):  # begins within the other one, and ends behind it
        second.set()
        thread.join()
        assert armed()
    assert not armed()
    with pytest.raises(KeyError), hard_stop(1000):
        raise KeyError
    assert not armed()
