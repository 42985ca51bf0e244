"""The jobs that the tests look at, in lanes that run beside each other on one virtual cluster.

Most of a job's time is waiting: for Slurm to notice a dead node, to start a requeued job, for a
watchdog. Two cores do the computing of one job in the waits of the others.
"""

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace as Told
from typing import Any

from tests.cluster.slurm import Cluster, Job, write_config
from tests.train.launch import flags

STEPS, SAVES = 8, 4
# TP 2 × DP 2, with the optimizer flags of the recipe (examples/configs/recipe.sh).
TP2_DP2: dict[str, Any] = dict(
    tensor_model_parallel_size=2,
    use_distributed_optimizer=True,
    dist_ckpt_optim_fully_reshardable=True,
)
HANG = 45  # seconds; more than a start-up takes on a busy machine


def arguments(model: Path, data: Path, **given: Any) -> list[str]:
    """Flags of a run of STEPS steps that saves every SAVES."""
    settled = dict(loss="dft", train_iters=STEPS, save_interval=SAVES, seed=7)
    return flags(model, data, **{**settled, **given})


class Stories:
    """Starts them all; `stories["name"]` waits for one and gives what its function returned."""

    def __init__(self, cluster: Cluster, model: Path, data: Path, directory: Path) -> None:
        self.cluster, self.model, self.data, self.directory = cluster, model, data, directory
        self._told: dict[str, Future] = {}
        self._lanes = [
            self._lane(_interrupted, _other_layout, _four_nodes),
            self._lane(_lost_node_frozen_rank_cancelled),
            self._lane(_full_disk, _bad_node),
            self._lane(_crash_loop, _refused, _time_limit),
        ]

    def _lane(self, *functions: Callable[["Stories"], Told]) -> ThreadPoolExecutor:
        lane = ThreadPoolExecutor(1)
        for function in functions:
            self._told[function.__name__.strip("_")] = lane.submit(function, self)
        return lane

    def __getitem__(self, name: str) -> Told:
        return self._told[name].result()

    def close(self) -> None:
        """Start no more of them; those that run end when the cluster says so."""
        self.cluster.closed = True
        for lane in self._lanes:
            lane.shutdown(cancel_futures=True)

    def submit(
        self,
        name: str,
        nodes: int,
        procs: int,
        *options: str,
        faults: str = "",
        last: str = "",
        settings: dict[str, Any] | None = None,
        **given: Any,
    ) -> Job:
        """A job of the real finetune.sbatch; `given` are flags, the others the configuration's."""
        path = write_config(
            self.directory / f"{name}.sh",
            arguments(self.model, self.data, **given),
            procs,
            faults,
            last,
            settings or {},
        )
        return self.cluster.submit(path, self.directory / name, nodes, options=options)


def _interrupted(stories: Stories) -> Told:
    """2 × 2 ranks: preflight, the signal in step 2, kill -9 of a rank in step 6, the rest."""
    job = stories.submit(
        "interrupted",
        2,
        2,
        faults="0:2:0:hold 1:6:3:kill",
        settings={"PREFLIGHT": 1, "PREFLIGHT_GB": 0.1},
        **TP2_DP2,
    )
    job.until("FAULT hold")
    job.signal_batch("USR1")
    job.until("requeueing: leg 0")
    early = job.success
    return Told(job=job, end=job.ended(), early=early)


def _other_layout(stories: Stories) -> Told:
    """Its checkpoints at PP 2, the newest with one flipped byte, the tracker garbage; srun starts
    the ranks."""
    before = stories["interrupted"].job
    run_dir = stories.directory / "other"
    shutil.copytree(before.run_dir / "checkpoints", run_dir / "checkpoints")
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("garbage")
    shard = next((run_dir / "checkpoints" / f"iter_{STEPS:07d}").glob("__0_*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    layout = TP2_DP2 | dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=2)
    job = stories.submit("other", 1, 2, settings={"LAUNCHER": "srun"}, **layout)
    return Told(job=job, end=job.ended())


def _four_nodes(stories: Stories) -> Told:
    """4 × 1 ranks, TP 2 × PP 2, from start to end without the listener."""
    job = stories.submit(
        "four",
        4,
        1,
        settings={"PYTHON": sys.executable},
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
    )
    return Told(job=job, end=job.ended())


def _lost_node_frozen_rank_cancelled(stories: Stories) -> Told:
    """2 × 1 ranks: a node dies in step 6, then a rank stands still in step 6, then scancel."""
    job = stories.submit(
        "faults",
        2,
        1,
        faults="0:6:0:hold 1:6:1:freeze 2:7:0:hold",
        tensor_model_parallel_size=2,
        # Only where a rank stands still: Slurm needs most of a minute to miss a node.
        last=f"[ ${{SLURM_RESTART_COUNT:-0}} != 1 ] || TRAIN_ARGS+=(--hang-timeout {HANG})",
    )
    job.until("FAULT hold in step 6")
    nodes = stories.cluster.names(job.show("NodeList"))
    stories.cluster.lab("kill-node", nodes[-1])
    job.until(r"\[job\] leg 1:")
    later = stories.cluster.names(job.show("NodeList"))
    stories.cluster.lab("start-node", nodes[-1])
    job.until("FAULT hold in step 7")
    stories.cluster.run("scancel", job.number)
    end = job.ended()
    return Told(job=job, end=end, killed=nodes[-1], later=later)


def _full_disk(stories: Stories) -> Told:
    """The checkpoints of one node lie on a disk that holds one of them and not two."""
    target = stories.directory / "full" / "checkpoints"
    target.mkdir(parents=True)
    node = f"n{stories.cluster.nodes}"
    mount = "mount -t tmpfs -o size=1200k tmpfs".split()
    stories.cluster.lab("on-node", node, *mount, str(target))
    job = stories.submit("full", 1, 1, f"--nodelist={node}", settings={"MAX_FRUITLESS": 2})
    end = job.ended()
    stories.cluster.lab("on-node", node, "cp", "-r", str(target), str(target) + "-seen")
    stories.cluster.lab("on-node", node, "umount", str(target))
    return Told(job=job, end=end, seen=target.with_name("checkpoints-seen"))


def _bad_node(stories: Stories) -> Told:
    """Preflight of two nodes, one of which has hardly any space where the checkpoints go."""
    target = stories.directory / "bad"
    target.mkdir()
    node = f"n{stories.cluster.nodes}"
    mount = "mount -t tmpfs -o size=8m tmpfs".split()
    stories.cluster.lab("on-node", node, *mount, str(target))
    job = stories.submit(
        "bad", 2, 1, f"--nodelist={node}", settings={"PREFLIGHT": 1, "PREFLIGHT_GB": 0.1}
    )
    end = job.ended()
    stories.cluster.lab("on-node", node, "umount", str(target))
    return Told(job=job, end=end, bad=node)


def _crash_loop(stories: Stories) -> Told:
    """Each leg dies at once."""
    job = stories.submit("loop", 1, 1, settings={"PYTHON": "/bin/false"})
    return Told(job=job, end=job.ended())


def _refused(stories: Stories) -> Told:
    """A wrong flag."""
    job = stories.submit("refused", 1, 1, keep_last=0)
    return Told(job=job, end=job.ended())


def _time_limit(stories: Stories) -> Told:
    """Slurm's own signal, somewhere in the first minute: it looks at its limits twice a minute."""
    job = stories.submit("limit", 1, 1, "--time=3", "--signal=B:USR1@120", faults="0:2:0:hold")
    return Told(job=job, end=job.ended())
