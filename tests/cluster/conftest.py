"""Fixtures: those of the training tests, and a virtual Slurm cluster of four nodes."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.cluster.slurm import LAB, Cluster
from tests.train.conftest import chats, data_cache, tiny_model  # noqa: F401


@pytest.fixture(scope="session")
def cluster():
    """Needs root, Debian's packages and network namespaces; required where CI is set."""
    installed = subprocess.run(["bash", LAB, "install"], capture_output=True, text=True)
    # A short path: munge's socket has to fit into 108 bytes.
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    up = None
    if installed.returncode == 0:
        up = subprocess.run(["bash", LAB, "up", directory, "4"], capture_output=True, text=True)
    if up is None or up.returncode != 0:
        words = (up or installed).stderr[-500:]
        if up is not None:
            subprocess.run(["bash", LAB, "down", directory], capture_output=True)
        if os.environ.get("CI"):
            pytest.fail(f"CI needs a virtual Slurm cluster: {words}")
        pytest.skip(f"no virtual Slurm cluster on this machine: {words}")
    try:
        yield Cluster(directory, 4)
    finally:
        subprocess.run(["bash", LAB, "down", directory], check=True)
        shutil.rmtree(directory, ignore_errors=True)
