"""finetune.sbatch and local.sh against what comes from outside: numbers that are programs, keys,
job names, other jobs in the same RUN_DIR. Slurm's commands are stand-ins; test_slurm.py has the
real ones."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `srun … bash NODE.SH` runs the script once, as the first node does.
STANDINS = {
    "scontrol": "case $1 in show) echo n1 ;; requeue) exit 1 ;; esac",
    "srun": 'printf "%s\\n" "$*" >>"$STUBS/srun"; exec bash "${@: -1}"',
    # Training: what it is given, and the word that $ENDS names.
    "python": 'printf "%s\\n" "$@" >"$STUBS/argv"; env >"$STUBS/env"; [ "$ENDS" = died ] || '
    '[ -z "$MEGATRON_DFT_STATUS" ] || echo "$ENDS 3" >"$MEGATRON_DFT_STATUS"',
}


class Job:
    """One job's directory and what it is run with."""

    def __init__(self, directory: Path) -> None:
        self.stubs, self.run_dir = directory / "stubs", directory / "run"
        self.stubs.mkdir()
        for name, text in STANDINS.items():
            (self.stubs / name).write_text(f"#!/bin/bash\n{text}\n")
            (self.stubs / name).chmod(0o755)
        (self.stubs / "squeue").touch(0o755)
        self.say(squeue="")
        self.config = directory / "config.sh"
        self.config.write_text("TRAIN_ARGS=(--loss dft)\n")

    def say(self, squeue: str, status: int = 0) -> None:
        """What squeue answers."""
        text = f"#!/bin/bash\necho -n {squeue!r}\nexit {status}\n"
        (self.stubs / "squeue").write_text(text)

    def run(self, *flags, script="slurm/finetune.sbatch", ends="finished", cwd=None, **env):
        values = {
            "PATH": f"{self.stubs}:{os.environ['PATH']}",
            "HOME": str(self.stubs),
            "STUBS": str(self.stubs),
            "ENDS": ends,
            "PYTHON": str(self.stubs / "python"),
            "PROCS_PER_NODE": "1",
            "PREFLIGHT": "0",
            "RUN_DIR": str(self.run_dir),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_SUBMIT_DIR": str(ROOT),
            **env,
        }
        dry = flags[:1] == ("--dry-run",)
        words = ["--dry-run", self.config, *flags[1:]] if dry else [self.config, *flags]
        return subprocess.run(
            ["bash", ROOT / "examples" / script, *words],
            env={k: v for k, v in values.items() if v is not None},
            capture_output=True,
            text=True,
            cwd=cwd,
        )

    def read(self, name: str) -> str:
        return (self.run_dir / name).read_text()


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_a_run_finishes_and_lets_go(job):
    ended = job.run()
    assert ended.returncode == 0, ended.stderr
    assert "step 3, job 42" in job.read("SUCCESS")
    assert not (job.run_dir / ".owner").exists()
    assert "megatron_dft.compat.loopback" in (job.stubs / "argv").read_text()


@pytest.mark.parametrize(
    "name", ["fruitless", "begun", "checkpoints/latest_checkpointed_iteration.txt"]
)
@pytest.mark.parametrize("text", ["RUN_DIR[$(touch {0})]", "a[$(touch {0})0]", "$(touch {0})", ""])
def test_a_file_that_is_no_number_is_never_run(name, text, job, tmp_path):
    (job.run_dir / "checkpoints").mkdir(parents=True)
    (job.run_dir / "begun").write_text("0\n")
    (job.run_dir / name).write_text(text.format(tmp_path / "ran") + "\n")
    assert job.run(ends="died").returncode == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_NNODES", "PROCS_PER_NODE", "MAX_RESTARTS"]
    + ["MAX_FRUITLESS", "STOP_SECONDS", "PREFLIGHT_GB"],
)
def test_a_variable_that_is_no_number_is_refused(name, job, tmp_path):
    ended = job.run(**{name: f"RUN_DIR[$(touch {tmp_path / 'ran'})]"})
    assert ended.returncode == 2 and ": expected a " in ended.stderr
    assert name in ended.stderr and not (tmp_path / "ran").exists()
    assert not job.run_dir.exists()


def test_leading_zeros_are_no_octal_number(job):
    job.run_dir.mkdir()
    (job.run_dir / "fruitless").write_text("008\n")
    (job.run_dir / "begun").write_text("0\n")
    assert job.run(ends="died", MAX_FRUITLESS="9").returncode == 70
    assert job.read("fruitless") == "9\n"


@pytest.mark.parametrize("begun", ["", "\n", "x"])
def test_an_empty_begun_is_no_failed_leg(begun, job):
    job.run_dir.mkdir()
    (job.run_dir / "begun").write_text(begun)
    (job.run_dir / "fruitless").write_text("2\n")
    assert job.run().returncode == 0  # a third one would have ended it
    assert (job.run_dir / "SUCCESS").exists()


def test_another_job_in_the_same_directory_is_refused_by_name(job):
    job.run_dir.mkdir()
    (job.run_dir / ".owner").write_text("77 n9 123 456\n")
    (job.run_dir / "begun").write_text("0\n")
    job.say("RUNNING\n")
    ended = job.run()
    assert ended.returncode == 2
    for word in ("job 77", "process 123 on n9", "RUNNING", str(job.run_dir)):
        assert word in ended.stderr
    assert job.read("begun") == "0\n" and not (job.run_dir / "legs").exists()
    # Slurm that does not answer says nothing of its death.
    job.say("", 1)
    assert "does not answer" in job.run().stderr
    job.say("slurm_load_jobs error: Invalid job id specified\n", 1)
    assert job.run().returncode == 0


def test_an_earlier_leg_of_the_same_job_is_taken_over(job):
    job.run_dir.mkdir()
    (job.run_dir / ".owner").write_text("42 n9 123 456\n")
    job.say("RUNNING\n")
    assert job.run(SLURM_RESTART_COUNT="1").returncode == 0


@pytest.mark.parametrize("kind", ["link", "dangling", "text"])
def test_an_owner_file_that_is_none_is_left_alone(kind, job, tmp_path):
    job.run_dir.mkdir()
    victim, file = tmp_path / "victim", job.run_dir / ".owner"
    if kind != "dangling":
        victim.write_text("precious")
    file.write_text("precious") if kind == "text" else file.symlink_to(victim)
    ended = job.run()
    assert ended.returncode == 2 and "delete it" in ended.stderr
    assert victim.exists() == (kind != "dangling")
    assert kind == "dangling" or victim.read_text() == "precious"
    assert not (job.run_dir / "legs").exists()


@pytest.mark.parametrize("name", ["../..", "/", "..", "a/../../b", "x\ny", "-rf", "."])
def test_a_job_name_stays_in_runs(name, job, tmp_path):
    """The checkout is a stand-in too: nothing may be made beside its runs/."""
    home = tmp_path / "home"
    shutil.copytree(ROOT / "examples", home / "examples")
    (home / "megatron_dft").mkdir()
    (home / "megatron_dft/train.py").touch()
    before = {path.name for path in tmp_path.iterdir()}
    ended = job.run(RUN_DIR=None, SLURM_JOB_NAME=name, SLURM_SUBMIT_DIR=str(home))
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == before
    assert {path.name for path in home.iterdir()} == {"examples", "megatron_dft", "runs"}
    (made,) = (home / "runs").iterdir()
    assert (made / "SUCCESS").exists()


SECRETS = {
    "HTTPS_PROXY": "http://me:hunter2secret@proxy:3128",
    "GITHUB_PAT": "ghp_planted0planted0planted0",
    "SLURM_JWT": "eyJplanted0planted",
    "MULTI_LINE": "-----BEGIN PRIVATE KEY-----\nplanted1\n-----END PRIVATE KEY-----",
    "AWS_SECRET_ACCESS_KEY": "planted2",
    "PIP_INDEX_URL": "https://u:planted3@pypi",
    "MYSQL_PWD": "planted4",
    "NCCL_TOKEN": "planted5",
}


def written(directory: Path) -> str:
    return "\n".join(p.read_text(errors="replace") for p in directory.rglob("*") if p.is_file())


def test_the_environment_of_a_leg_is_a_list_and_private(job):
    ended = job.run(**SECRETS, NCCL_DEBUG="INFO")
    assert ended.returncode == 0
    text = written(job.run_dir) + ended.stdout + ended.stderr
    for name, value in SECRETS.items():
        assert name not in text and not any(line in text for line in value.splitlines())
    assert "NCCL_DEBUG=INFO" in job.read("legs/0/environment").splitlines()
    leg = job.run_dir / "legs/0"
    assert {p.name: p.stat().st_mode & 0o077 for p in leg.iterdir() if p.name != "status"} == {
        name: 0 for name in ("config.sh", "environment", "finetune.sbatch", "node.sh")
    }


KEYS = ["--wandb-key", "planted1", "--api-token=planted2", "HF_TOKEN=planted3", "--url"]
KEYS += ["https://me:planted4@host/x", "--api-key", "-----BEGIN\nplanted5\n", "--other", "a b$c"]


def test_keys_reach_training_and_no_file(job):
    ended = job.run(*KEYS)
    assert ended.returncode == 0, ended.stderr
    assert (job.stubs / "argv").read_text().endswith("\n".join(KEYS) + "\n")
    assert "planted" not in written(job.run_dir) + ended.stdout + ended.stderr
    shown = job.run("--dry-run", *KEYS).stdout
    assert "--other" in shown and "planted" not in shown
    local = job.run(*KEYS, script="local.sh", SLURM_JOB_ID=None)
    assert local.returncode == 0, local.stderr
    assert (job.stubs / "argv").read_text().endswith("\n".join(KEYS) + "\n")
    assert "--other" in job.read("command") and "planted" not in written(job.run_dir)


def test_two_local_runs(job):
    """The second is refused while the first one's process lives."""
    job.run_dir.mkdir()
    words = subprocess.run(
        ["bash", "-c", f". {ROOT}/examples/slurm/guard.sh; echo 0 $HOSTNAME $PPID $(born $PPID)"],
        capture_output=True,
        text=True,
        check=True,
    )
    (job.run_dir / ".owner").write_text(words.stdout)
    (job.run_dir / "stop").touch()
    ended = job.run(script="local.sh", SLURM_JOB_ID=None)
    assert ended.returncode == 2 and f"process {os.getpid()}" in ended.stderr
    assert (job.run_dir / "stop").exists()
    (job.run_dir / ".owner").write_text(words.stdout.strip() + "1\n")  # another process by then
    assert job.run(script="local.sh", SLURM_JOB_ID=None).returncode == 0


def test_caches_of_compiled_code_have_no_predictable_name(job, tmp_path):
    assert job.run(TMPDIR=str(tmp_path)).returncode == 0
    env = dict(
        line.split("=", 1) for line in (job.stubs / "env").read_text().splitlines() if "=" in line
    )
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        parent = Path(env[name]).parent
        assert parent.parent == tmp_path and parent.stat().st_mode & 0o777 == 0o700
    assert "/tmp/" not in (ROOT / "examples/slurm/environment.sh").read_text()


@pytest.mark.parametrize("script", ["slurm/finetune.sbatch", "local.sh"])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_relative_paths_are_those_of_where_the_command_was_given(script, dry, job, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("a.jsonl", "v.csv", "model"):
        (here / name).touch()
    given = (
        "--train-data 0.5,cap=3:a.jsonl 0.5:org/name --valid-data=v.csv --hf-model model".split()
    )
    job_id = None if script == "local.sh" else "42"
    named = dict(RUN_DIR="run", HF_HOME="../hf", PYTHON="../stubs/python")
    ended = job.run(*dry, *given, "--tensorboard-dir", "tb", script=script, cwd=here,
                    SLURM_JOB_ID=job_id, **named)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    words = (job.stubs / "argv").read_text().splitlines()
    for word in (f"0.5,cap=3:{here}/a.jsonl", "0.5:org/name", f"--valid-data={here}/v.csv",
                 f"{here}/model", f"{here}/tb", f"{here}/run/checkpoints"):  # fmt: skip
        assert word in words, word
    assert f"HF_HOME={tmp_path}/hf\n" in (job.stubs / "env").read_text()
    assert bool(dry) or (here / "run" / "config.sh").exists() or (here / "run" / "legs").exists()
    assert ("--dry-run" in words) == bool(dry)
