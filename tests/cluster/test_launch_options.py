"""finetune.sbatch: who starts the ranks, what a container sees, cores beside the GPU."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.test_job_script import Job

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def run_node(job, shown: str, **env: str) -> subprocess.CompletedProcess:
    """Run the script that --dry-run shows, with Slurm's variables of one task; its own python."""
    script = job.stubs / "node.sh"
    script.write_text(shown.split("\n", 1)[1])
    return subprocess.run(
        ["bash", script],
        env={"PATH": f"{job.stubs}:{os.environ['PATH']}", "STUBS": str(job.stubs), "ENDS": "died"}
        | env,
        capture_output=True,
        text=True,
    )


def seen(job) -> dict[str, str]:
    """The environment of the training process."""
    lines = (job.stubs / "env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_srun_starts_a_task_a_rank(job):
    dry = dict(LAUNCHER="srun", PROCS_PER_NODE="4", SLURM_NNODES="2", SLURM_CPUS_ON_NODE="32")
    shown = job.run("--dry-run", **dry).stdout
    first = shown.split("\n", 1)[0]
    assert "--ntasks 8 --ntasks-per-node 4 --cpus-per-task 8 --cpu-bind none" in first
    assert "torch.distributed" not in shown and "loopback" not in shown
    task = dict(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_NODEID="1")
    assert run_node(job, shown, **task).returncode == 0
    words = (job.stubs / "argv").read_text().split("\n")
    assert words[:2] == ["-m", "megatron_dft.train"]
    found = seen(job)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("5", "1", "8")
    assert (found["LOCAL_WORLD_SIZE"], found["MASTER_ADDR"]) == ("4", "n1")
    assert found["MASTER_PORT"] == "15042", "of the job's number"


def test_torchrun_is_a_task_a_node(job):
    shown = job.run("--dry-run", PROCS_PER_NODE="4", SLURM_NNODES="2").stdout
    assert "--ntasks 2 --ntasks-per-node 1 bash" in shown and "--numa-binding" not in shown
    assert "--nnodes 2 --nproc-per-node 4 --node-rank" in shown


@pytest.mark.parametrize("procs", ["1", "4"])
def test_preflight_has_one_task_a_node_whoever_starts_the_ranks(procs, job):
    ended = job.run(LAUNCHER="srun", PREFLIGHT="1", PROCS_PER_NODE=procs)
    assert ended.returncode != 2
    (asked,) = (x for x in (job.stubs / "srun").read_text().splitlines() if " preflight " in x)
    assert "--ntasks 1 --ntasks-per-node 1" in asked


@pytest.mark.parametrize(("node", "bound"), [("1", True), ("-1", False)])
def test_a_rank_is_bound_beside_its_gpu(node, bound, job):
    for nodes in ("1", "2"):
        shown = job.run("--dry-run", NUMA_BIND="1", SLURM_NNODES=nodes).stdout
        assert "--numa-binding node" in shown.splitlines()[-1]
    shown = job.run("--dry-run", NUMA_BIND="1", LAUNCHER="srun").stdout
    # A GPU and its place in /sys, where there is none.
    (job.stubs / "nvidia-smi").write_text(
        '#!/bin/bash\necho "$*" >>"$STUBS/asked"\necho 00000000:3B:00.0\n'
    )
    (job.stubs / "numactl").write_text('#!/bin/bash\necho "$*" >"$STUBS/bound"\nexec "${@:3}"\n')
    (job.stubs / "cat").write_text(
        '#!/bin/bash\n[ "$1" = /sys/bus/pci/devices/0000:3b:00.0/numa_node ] && echo ' + node + "\n"
    )
    for name in ("nvidia-smi", "numactl", "cat"):
        (job.stubs / name).chmod(0o755)
    ended = run_node(job, shown, SLURM_PROCID="3", SLURM_LOCALID="1")
    assert ended.returncode == 0 and (job.stubs / "argv").exists(), ended.stderr
    assert "-i 1" in (job.stubs / "asked").read_text()
    assert (job.stubs / "bound").exists() == bound
    if bound:
        assert (job.stubs / "bound").read_text().startswith("--cpunodebind=1 --localalloc ")
    assert ("rank 3 is not bound" in ended.stdout) != bound


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LAUNCHER", "ft_launcher", "nvidia-resiliency-ext 0.6"),
        ("LAUNCHER", "mpirun", "expected torchrun or srun, got 'mpirun'"),
        ("NUMA_BIND", "yes", "expected 0 or 1, got 'yes'"),
    ],
)
def test_what_is_not_supported_is_refused(name, value, message, job):
    ended = job.run(**{name: value})
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: {name}: ")
    assert message in ended.stderr and not job.run_dir.exists()


def mounted(job, tmp_path, **env: str) -> list[str]:
    given = {"HF_HOME": str(tmp_path / "hf"), "MEGATRON_DFT_DATA_CACHE": str(tmp_path / "cache")}
    ended = job.run("--dry-run", CONTAINER_IMAGE="x.sqsh", **(given | env))
    assert ended.returncode == 0, ended.stderr
    words = ended.stdout.split("\n", 1)[0].split()
    return words[words.index("--container-mounts") + 1].split(",")


def test_a_container_sees_data_model_and_caches(job, tmp_path):
    for name in ("hf", "cache", "data", "real", "run"):
        (tmp_path / name).mkdir()
    snapshot = tmp_path / "hub" / "models--o--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "real" / "t.jsonl").touch()
    (tmp_path / "data" / "t.jsonl").symlink_to(tmp_path / "real" / "t.jsonl")
    (tmp_path / "v.jsonl").touch()
    found = mounted(
        job,
        tmp_path,
        TRAIN_DATA=f"0.7,cap=3:{tmp_path}/data/t.jsonl",
        VALID_DATA=str(tmp_path / "v.jsonl"),
        MODEL=str(snapshot),
        CONTAINER_MOUNTS="/a:/b",
    )
    places = ["run", "data/t.jsonl", "real/t.jsonl", "v.jsonl", "hub/models--o--m", "hf", "cache"]
    for place in (*(tmp_path / p for p in places), ROOT):
        assert f"{place}:{place}" in found, place
    assert found[-1] == "/a:/b" and len(found) == len(set(found))
    # A hub name is no path, and what is not there is not mounted.
    found = mounted(job, tmp_path, MODEL="Qwen/Qwen2.5", TRAIN_DATA="/nowhere/t.jsonl")
    assert not any("Qwen" in m or "nowhere" in m for m in found)


def test_a_container_without_caches_of_its_own_takes_those_of_home(job, tmp_path):
    home = job.stubs / ".cache"
    found = mounted(job, tmp_path, HF_HOME=None, MEGATRON_DFT_DATA_CACHE=None)
    assert not any(str(home) in m for m in found), "a dry run makes no directory"
    ended = job.run(CONTAINER_IMAGE="x.sqsh", HF_HOME=None, MEGATRON_DFT_DATA_CACHE=None)
    assert ended.returncode == 0, ended.stderr
    asked = (job.stubs / "srun").read_text()
    for place in (home / "huggingface", home / "megatron_dft" / "data"):
        assert place.is_dir() and f"{place}:{place}" in asked
    assert seen(job)["HF_HOME"] == str(home / "huggingface")


def test_a_name_that_no_mount_can_have_is_refused(job, tmp_path):
    (tmp_path / "a,b").touch()
    ended = job.run("--dry-run", CONTAINER_IMAGE="x", TRAIN_DATA=str(tmp_path / "a,b"))
    assert ended.returncode == 2 and "a,b: cannot be mounted" in ended.stderr
