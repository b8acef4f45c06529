"""recipes/accelerate/slurm.sh with stand-ins for SLURM's commands: time is up, and the requeued job resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.same_runs import assert_same_weights
from tests.support.recipe_runs import CONFIGURED, SMALL, finish

pytestmark = pytest.mark.faults
RUN = [*SMALL, "--per_device_train_batch_size=8", "--save_steps=50"]

# srun starts one task, with the cores that it is told to; a signal to a step reaches its first process only, as in
# SLURM by default.
STAND_INS = {
    "srun": '[ "$1" = --cpus-per-task=16 ] || exit 9\n'
    'shift; export SLURM_NODEID=0; echo $$ > "$SPOOL/step"; exec "$@"',
    "scancel": 'kill -USR1 "$(cat "$SPOOL/step")"',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$SPOOL/requeued"; fi',
}


@pytest.fixture
def cluster(tmp_path, subprocess_env):
    """Environment of a job on one node with two devices, and the folder where the stand-ins write."""
    spool, programs = tmp_path / "spool", tmp_path / "bin"
    spool.mkdir()
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    job["SLURM_CPUS_PER_TASK"] = "16"
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess_env | job | {"SPOOL": str(spool), "PATH": path}, spool


def submit(env, log, folder, *arguments):
    with log.open("ab") as output:
        return subprocess.Popen(
            ["bash", "recipes/accelerate/slurm.sh", *RUN, f"--output_dir={folder}", *arguments],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def test_job_saves_when_its_time_is_up_and_goes_on_in_the_next(cluster, tmp_path, subprocess_env):
    env, spool = cluster
    folder, log = tmp_path / "run", tmp_path / "job.log"
    job = submit(env, log, folder)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text()) < 200:
            assert job.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.01)
        # As --signal=B:USR1@300 does: to the script of the job alone.
        os.kill(job.pid, signal.SIGUSR1)
        assert job.wait(timeout=120) == 0, log.read_text()[-3000:]
        assert (spool / "requeued").read_text() == "requeue 7\n"
        saved = [path.name for path in folder.glob("checkpoint-[0-9]*")]
        assert len(saved) == 1, log.read_text()[-3000:]
        assert not (folder / "model.safetensors").exists()
        job = submit(env, log, folder)
        assert job.wait(timeout=400) == 0, log.read_text()[-3000:]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert (spool / "requeued").read_text() == "requeue 7\n", "a finished job goes back into the queue"
    assert "stopped by SIGUSR1" in log.read_text()
    assert f"resuming from {folder / saved[0]}" in log.read_text()
    whole = tmp_path / "whole"
    finish(
        [*CONFIGURED["cpu.yaml"], str(ROOT / "recipes/train_ham.py"), *RUN, f"--output_dir={whole}"], subprocess_env
    )
    assert_same_weights(folder, whole, "model.safetensors")


def test_job_that_fails_stays_out_of_the_queue(cluster, tmp_path):
    env, spool = cluster
    log = tmp_path / "job.log"
    assert submit(env, log, tmp_path / "run", "--epsilon=-1").wait(timeout=300) not in (0, None)
    assert "--epsilon -1" in log.read_text()
    assert not (spool / "requeued").exists()
