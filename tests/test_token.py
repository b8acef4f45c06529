"""The access token is in no file, log, metric, message or process list, whether pushes succeed or fail."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.hub_server import Hub, hub_environment
from tests.support.recipe_runs import SMALL

pytestmark = pytest.mark.slow

# The Hub's own shape, and one that no pattern would find.
TOKENS = ("hf_DistinctiveToken0123456789", "a-token.of_another+shape/0123456789")
RUN = [*SMALL, "--num_train_epochs=1", "--per_device_train_batch_size=60", "--save_steps=1"]
RUN += ["--report_to=tensorboard", "--push_to_hub", "--hub_model_id=robust", "--hub_strategy=every_save"]
PREPARED: dict[str, Callable[[Hub], object]] = {
    "passing": lambda hub: (hub.fail("POST .*/commit/", status=503), hub.disturb("drop", "POST .*/commit/")),
    "failing in the end": lambda hub: hub.fail("POST .*/commit/", status=403, times=10_000),
    "refused at once": lambda hub: hub.fail("POST /api/repos/create", status=401, times=10_000),
    "strange answer": lambda hub: hub.fail(
        "POST /api/repos/create", status=302, times=10_000, headers={"Location": hub.url + "/login"}
    ),
}


def seen_in_processes(secret: bytes, stop: threading.Event) -> list[str]:
    """Command lines with ``secret`` of any process of this machine, looked for until ``stop``."""
    found = []
    while not stop.wait(0.05):
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = process.read_bytes()
            except OSError:  # it has ended
                continue
            if secret in words:
                found.append(words.decode(errors="replace"))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("prepare", "token", "status"),
    [
        pytest.param("failing in the end", TOKENS[0], 2, marks=pytest.mark.faults(quick=True)),
        pytest.param("passing", TOKENS[1], 0, marks=pytest.mark.faults),
        pytest.param("failing in the end", TOKENS[1], 2, marks=pytest.mark.faults),
        pytest.param("refused at once", TOKENS[0], 2, marks=pytest.mark.faults),
        pytest.param("strange answer", TOKENS[1], 2, marks=pytest.mark.faults),
    ],
)
def test_the_token_is_nowhere(tmp_path: Path, prepare: str, token: str, status: int) -> None:
    folder, stop, found = tmp_path / "run", threading.Event(), list[str]()
    looking = threading.Thread(target=lambda: found.extend(seen_in_processes(token.encode(), stop)))
    with Hub({token: "me"}) as hub:
        PREPARED[prepare](hub)
        environment = hub_environment(hub, tmp_path, token=token)
        environment |= {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "HF_HUB_VERBOSITY": "debug"}
        looking.start()
        command = [sys.executable, str(ROOT / "recipes/train_ham.py"), *RUN, f"--output_dir={folder}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        stop.set()
        looking.join()
    assert done.returncode == status, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert found == []
    assert token not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if token.encode() in path.read_bytes()] == []
    published = [blob.data for repo in hub.repos.values() for blob in repo.tree().values()]
    assert not any(token.encode() in data for data in published)
    if status == 0 or prepare == "failing in the end":
        assert list((folder / "logs").rglob("events.out.tfevents.*"))  # the tracker was among what was searched
        assert (folder / "report.json").is_file()
