"""Fixture: a virtual Slurm cluster."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.cluster.slurm import LAB, Cluster
from tests.cluster.stories import Stories

NODES = 8
STARTS = "test_the_jobs_are_under_way"


def pytest_collection_modifyitems(items):
    """The jobs begin first and what waits for them comes last: they wait for Slurm most of the
    time, and the other tests of this directory run meanwhile. Not those of others: some replace
    what starts a process, which the jobs' threads would be given too."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    waits = [item for item in here if "stories" in item.fixturenames]
    ordered = [item for item in here if item not in waits]
    for item in waits:
        ordered.insert(0, item) if item.name == STARTS else ordered.append(item)
    items[:] = ordered + [item for item in items if item not in here]


@pytest.fixture(scope="session")
def cluster():
    """Needs root, Debian's packages and network namespaces; required where CI is set."""
    installed = subprocess.run(["bash", LAB, "install"], capture_output=True, text=True)
    # A short path: munge's socket has to fit into 108 bytes.
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    up = None
    if installed.returncode == 0:
        up = subprocess.run(
            ["bash", LAB, "up", directory, str(NODES)], capture_output=True, text=True
        )
    if up is None or up.returncode != 0:
        words = (up or installed).stderr[-500:]
        if up is not None:
            subprocess.run(["bash", LAB, "down", directory], capture_output=True)
        if os.environ.get("CI"):
            pytest.fail(f"CI needs a virtual Slurm cluster: {words}")
        pytest.skip(f"no virtual Slurm cluster on this machine: {words}")
    try:
        yield Cluster(directory, NODES)
    finally:
        subprocess.run(["bash", LAB, "down", directory], check=True)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def stories(cluster, tiny_model, chats, data_cache, tmp_path_factory):
    """The jobs, started when the first test asks for one."""
    told = Stories(cluster, tiny_model, chats, tmp_path_factory.mktemp("jobs"))
    try:
        yield told
    finally:
        told.close()
