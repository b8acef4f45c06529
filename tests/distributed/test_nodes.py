"""Several nodes for real: two network namespaces with addresses of their own, joined by a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ham_hf.training.checkpoint import list_checkpoints
from tests.conftest import ROOT
from tests.faults.same_runs import assert_same_weights
from tests.support.recipe_runs import CONFIGURED, SMALL, finish

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ADDRESSES = ("10.119.77.1", "10.119.77.2")
CABLE = "ham0"
TIMEOUT = 30
RUN = [
    str(ROOT / "recipes/train_ham.py"),
    *SMALL,
    "--per_device_train_batch_size=8",
    "--save_steps=3",
    f"--ddp_timeout={TIMEOUT}",
]


@dataclass(frozen=True)
class Node:
    """A network namespace, which to programs in it is a machine of its own."""

    name: str
    rank: int

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.name, *arguments], check=True, capture_output=True, text=True)

    def start(
        self, env: dict[str, str], log: Path, *arguments: str, before: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        command = [
            *["ip", "netns", "exec", self.name, *before, *CONFIGURED["multi_node.yaml"]],
            *["--num_machines=2", "--num_processes=2", f"--machine_rank={self.rank}"],
            *[f"--main_process_ip={ADDRESSES[0]}", "--main_process_port=29501", *RUN, *arguments],
        ]
        with log.open("wb") as output:
            return subprocess.Popen(
                command, env=env | {"GLOO_SOCKET_IFNAME": CABLE}, stdout=output, stderr=output, start_new_session=True
            )


@pytest.fixture
def nodes():
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip (iproute2)")
    found = [Node(f"ham-{os.getpid()}-{rank}", rank) for rank in range(2)]
    try:
        for node in found:
            made = subprocess.run(["ip", "netns", "add", node.name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
        cable = ["link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", found[1].name]
        made = subprocess.run(["ip", "-n", found[0].name, *cable], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"there is no virtual cable here: {made.stderr.strip()}")
        for node, address in zip(found, ADDRESSES, strict=True):
            node.ip("addr", "add", f"{address}/24", "dev", CABLE)
            node.ip("link", "set", "lo", "up")
            node.ip("link", "set", CABLE, "up")
        yield found
    finally:
        for node in found:
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True)


def end(runs):
    for run in runs:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def run_nodes(nodes, env, folder, *arguments):
    """Start the run on all nodes and wait for its end; what each printed."""
    logs = [folder.with_name(f"{folder.name}-{node.rank}.log") for node in nodes]
    runs = [node.start(env, log, f"--output_dir={folder}", *arguments) for node, log in zip(nodes, logs, strict=True)]
    try:
        for run, log in zip(runs, logs, strict=True):
            assert run.wait(timeout=400) == 0, log.read_text()[-4000:]
    finally:
        end(runs)
    return [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def on_one_node(tmp_path_factory, subprocess_env):
    """The folder of a run of two processes on one machine."""
    folder = tmp_path_factory.mktemp("one") / "run"
    finish([*CONFIGURED["cpu.yaml"], *RUN, f"--output_dir={folder}"], subprocess_env)
    return folder


def test_two_nodes_end_with_the_weights_of_one(nodes, on_one_node, tmp_path, subprocess_env):
    printed = run_nodes(nodes, subprocess_env, tmp_path / "run")
    assert "2 process(es) on cpu" in printed[0]
    assert_same_weights(tmp_path / "run", on_one_node, "model.safetensors")


def test_cut_cable_stops_both_ends_and_the_run_goes_on(nodes, on_one_node, tmp_path, subprocess_env):
    folder, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"]
    runs = [node.start(subprocess_env, log, f"--output_dir={folder}") for node, log in zip(nodes, logs, strict=True)]
    try:
        deadline = time.monotonic() + 300
        while not (folder / "checkpoint-12").exists():
            assert all(run.poll() is None for run in runs), [log.read_text()[-2000:] for log in logs]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        nodes[1].ip("link", "set", CABLE, "down")
        since = time.monotonic()
        for run, log in zip(runs, logs, strict=True):
            # The launcher needs a little to notice that its process has ended.
            assert run.wait(timeout=max(1.0, since + TIMEOUT + 60 - time.monotonic())) != 0, log.read_text()[-2000:]
        print(f"both ends stopped {time.monotonic() - since:.0f} s after the cut, with --ddp_timeout {TIMEOUT}")
    finally:
        end(runs)
    for log in logs:
        assert "--resume_from_checkpoint latest" in log.read_text()
    assert "checkpoint-22" not in [path.name for path in list_checkpoints(folder)]
    nodes[1].ip("link", "set", CABLE, "up")
    printed = run_nodes(nodes, subprocess_env, folder, "--resume_from_checkpoint=latest")
    assert "resuming from" in printed[0]
    assert_same_weights(folder, on_one_node, "model.safetensors")


@pytest.mark.parametrize("resume", [False, True], ids=["new_run", "resumed"])
def test_folders_that_are_not_shared_are_refused(nodes, tmp_path, subprocess_env, on_one_node, resume):
    """The same path on a disk of its own, which the second node gets by mounting one over it."""
    folder, logs = tmp_path / "disk/run", [tmp_path / "0.log", tmp_path / "1.log"]
    folder.parent.mkdir()
    if resume:
        shutil.copytree(on_one_node, folder)
    own_disk = ["unshare", "-m", "bash", "-c", f'mount -t tmpfs none {folder.parent} && exec "$@"', "own_disk"]
    if subprocess.run([*own_disk, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    arguments = [f"--output_dir={folder}", *(["--resume_from_checkpoint=latest"] if resume else [])]
    runs = [
        node.start(subprocess_env, log, *arguments, before=own_disk if node.rank else [])
        for node, log in zip(nodes, logs, strict=True)
    ]
    try:
        for run, log in zip(runs, logs, strict=True):
            assert run.wait(timeout=300) != 0
            said = (
                "not every process finds" if resume else "1 of 2 processes do not find there what the main one wrote"
            )
            assert said in log.read_text()
            assert "on a file system that all nodes share" in log.read_text()
    finally:
        end(runs)
