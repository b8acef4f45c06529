"""Everything that a Hub can do to a run: training continues, and at the end every message says what is where."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from huggingface_hub import constants, file_download, get_session
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file

from ham_hf import hub as ham_hub, hub_requests, training_run
from ham_hf.hub import PushError, SavePushes, check_write_access, push_folder, try_push
from ham_hf.hub_requests import SILENCE_LIMIT, asked_wait, limit_waiting
from ham_hf.models.source import resolve_source
from tests.support.hub_server import BOTH_WAYS, Hub, content, use_hub
from tests.support.recipe_runs import SMALL, recipe_module
from tests.support.tables import cases

pytestmark = [pytest.mark.slow, pytest.mark.faults(quick=True)]

TOKEN = "hf_writer0123456789"
ALWAYS = 10_000


@pytest.fixture
def hub(request, monkeypatch, tmp_path, waits):
    """A Hub that this process talks to as "me", and that it soon stops waiting for."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.2, raising=False)
    monkeypatch.setattr(hub_requests, "SILENCE_LIMIT", 0.2)
    pipeline = getattr(request, "param", None) == "pipeline"
    with Hub({TOKEN: "me"}) as server:
        use_hub(server, monkeypatch, tmp_path / "hf_home", TOKEN, pipeline=pipeline)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder with what a push asks for."""
    path = tmp_path / "run"
    path.mkdir()
    model = timm.create_model("test_resnet", num_classes=3)
    save_file(model.state_dict(), path / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "num_classes": 3}
    (path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": cfg}))
    (path / "README.md").write_text("---\nlibrary_name: timm\n---\n# robust\n")
    return path


def refuse(status: int, **headers: str) -> Callable[[Hub, str], None]:
    return lambda hub, pattern: hub.fail(pattern, status=status, headers=headers, times=ALWAYS)


FAULTS: dict[str, Callable[[Hub, str], None]] = {
    **{str(status): refuse(status) for status in (401, 403, 404, 409, 412, 500, 502, 503)},
    "429": refuse(429, **{"Retry-After": "7"}),
    "429 for a day": refuse(429, **{"Retry-After": "86400"}),
    "429 by budget": refuse(429, RateLimit='"api";r=0;t=3000'),
    "reset": lambda hub, pattern: hub.disturb("drop", pattern, times=ALWAYS),
    "lost answer": lambda hub, pattern: hub.disturb("lose_reply", pattern, times=ALWAYS),
    "hanging": lambda hub, pattern: hub.disturb("hang", pattern, times=ALWAYS),
}
ADVICE = {"401": "renew HF_TOKEN", "403": "get the rights", "429 for a day": "86400 s", "429 by budget": "3000 s"}


@BOTH_WAYS
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "lost answer"])  # which is no failure
def test_a_push_that_fails_for_good_leaves_the_folder_and_names_the_command(hub, folder, waits, fault):
    repo_id = check_write_access("robust", private=False)
    FAULTS[fault](hub, "POST .*/commit/")
    before = content(folder)
    with pytest.raises(PushError) as caught:
        push_folder(folder, repo_id)
    message = str(caught.value)
    assert f"The folder {folder} is complete and unchanged" in message
    assert message.endswith(f"    ham-hf push {folder} --hub_model_id me/robust")
    assert ADVICE.get(fault, "") in message
    assert content(folder) == before
    # Bounded: how often, and how long in between, whether huggingface_hub waits or we do.
    commits = ALWAYS - hub.faults[-1].times
    assert commits <= 18
    assert max(waits, default=0) <= 8
    once = {"401", "403", "404", "429 for a day", "429 by budget"}
    assert (commits == 1) == (fault in once)
    # The one command, after the fault has passed.
    hub.faults.clear()
    push_folder(folder, repo_id)
    assert hub.model("me/robust").tree()["model.safetensors"].data == (folder / "model.safetensors").read_bytes()


PASSING = [(fault, "commit") for fault in ("409", "412", "429", "500", "502", "hanging")]
PASSING += itertools.product(["503", "reset", "lost answer"], ["validate-yaml", "preupload", "commit"])


@BOTH_WAYS
@pytest.mark.parametrize(("fault", "request_"), PASSING)
def test_a_fault_that_passes_is_sat_out(hub: Hub, folder: Path, waits: list[float], fault: str, request_: str) -> None:
    repo_id = check_write_access("robust", private=False)
    FAULTS[fault](hub, f"POST .*/{request_}")
    hub.faults[-1].times = 1
    before = content(folder)
    push_folder(folder, repo_id)
    assert hub.faults[-1].times == 0
    assert content(folder) == before
    assert all(hub.model("me/robust").tree()[name].data == data for name, data in before.items())
    if fault == "429":
        assert any(7 <= wait <= 8 for wait in waits)  # what the server asked for; huggingface_hub adds a second


@BOTH_WAYS
def test_a_commit_of_somebody_else_in_between_stays(hub: Hub, folder: Path) -> None:
    repo_id = check_write_access("robust", private=False)
    repo = hub.model("me/robust")
    hub.before("POST .*/commit/", lambda: hub.commit("me/robust", {"notes.md": b"mine"}, "notes"))
    push_folder(folder, repo_id)
    assert repo.tree()["notes.md"].data == b"mine"
    assert repo.tree()["config.json"].data == (folder / "config.json").read_bytes()
    assert [found.title for found in repo.history()] == ["Upload model", "notes", "initial commit"]


@pytest.mark.parametrize("fault", FAULTS)
def test_access_is_checked_in_bounded_time(hub: Hub, waits: list[float], fault: str) -> None:
    FAULTS[fault](hub, "POST /api/repos/create")
    with pytest.raises(ValueError, match=r"^--(push_to_hub|hub_model_id)\b"):
        check_write_access("robust", private=False)
    assert ALWAYS - hub.faults[-1].times <= 3
    assert max(waits, default=0) <= 8
    if fault == "429":
        assert waits == [7, 7]


def test_a_call_that_turns_its_time_limit_off_still_has_one(hub: Hub) -> None:
    check_write_access("robust", private=False)
    hub.disturb("hang", "GET /api/models/me/robust", times=ALWAYS)
    since = time.monotonic()
    with pytest.raises(ValueError, match="cannot reach"):
        check_write_access("robust", private=True)  # asks whether it is private, without a limit
    assert time.monotonic() - since < 10


def test_a_request_without_a_time_limit_gets_ours_and_one_with_a_limit_keeps_it() -> None:
    limit_waiting()
    limit_waiting()  # once is enough, twice the same
    client = get_session()
    assert sum(hook.__module__ == "ham_hf.hub_requests" for hook in client.event_hooks["request"]) == 1
    for given, seconds in ((None, SILENCE_LIMIT), (5, 5)):
        request = client.build_request("GET", "http://localhost", timeout=given)
        for hook in client.event_hooks["request"]:
            hook(request)
        assert set(request.extensions["timeout"].values()) == {seconds}


def test_limits_leave_the_rest_of_the_client_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    client = type(get_session())
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", None)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", lambda: client(timeout=7.0, follow_redirects=False))
    limit_waiting()
    limited = get_session()
    assert (limited.timeout, limited.follow_redirects) == (client(timeout=7.0).timeout, False)


@pytest.mark.parametrize(("headers", "seconds"), cases(__file__, "server_waits.yaml"))
def test_the_wait_that_a_server_asks_for(headers: dict[str, str], seconds: int | None) -> None:
    assert asked_wait(headers) == seconds


# A push beside the training, which other processes wait for


def test_a_quick_push_has_ended_when_training_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(ham_hub, "try_push", lambda *_, **options: done.append(options["commit_message"]))
    pushes = SavePushes("folder", "me/robust", revision="main", patience=30)
    for number in range(3):
        pushes.push(lambda: done.append("export"), commit_message=f"Step {number}")
        assert done == [word for step in range(number + 1) for word in ("export", f"Step {step}")]


def test_a_slow_push_runs_beside_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    release, exported = threading.Event(), list[int]()
    monkeypatch.setattr(ham_hub, "try_push", lambda *_, **__: release.wait())
    pushes = SavePushes("folder", "me/robust", revision="main", patience=0.05)
    since = time.monotonic()
    for number in range(2):
        pushes.push(lambda number=number: exported.append(number), commit_message="")
    assert time.monotonic() - since < 10
    assert exported == [0]  # the second save neither writes nor pushes
    assert pushes._last is not None
    assert pushes._last.daemon  # the end of the process does not wait for it
    assert not pushes.wait(0.05)
    release.set()
    assert pushes.wait()


# A whole training


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a Hub."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    recipe_module("train_ham.py").main([*RUN, f"--output_dir={folder}"])
    return folder


RUN = [*SMALL, "--per_device_train_batch_size=20", "--save_steps=1", "--save_total_limit=1"]


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["pipeline"], indirect=True)
def test_training_goes_on_whatever_the_hub_does(hub, undisturbed, tmp_path, monkeypatch, capsys, caplog):
    """A push after every update, each meeting another fault; a last push that fails; the command that mends it."""
    folder, recipe, met = tmp_path / "run", recipe_module("train_ham.py"), {}
    left = iter(FAULTS)

    def push_meeting_a_fault(*arguments: object, **options: object) -> bool:
        fault = next(left, "none")
        hub.faults.clear()
        if fault in FAULTS:
            FAULTS[fault](hub, "POST .*/(preupload|commit)/")
        met[fault] = try_push(*arguments, **options)
        hub.faults.clear()
        return met[fault]

    monkeypatch.setattr(ham_hub, "try_push", push_meeting_a_fault)
    original = training_run.push_finished

    def last_push(*arguments: object) -> None:
        hub.fail("POST .*/commit/", status=503, times=ALWAYS)
        original(*arguments)

    monkeypatch.setattr(training_run, "push_finished", last_push)
    options = ["--push_to_hub", "--hub_model_id=robust", "--hub_strategy=every_save", f"--output_dir={folder}"]
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as stop:
        recipe.main([*RUN, *options])
    assert stop.value.code == 2
    assert set(met) == {*FAULTS, "none"}
    assert met == {fault: fault == "none" for fault in met}
    assert caplog.text.count("Training continues, the next save pushes again") == len(FAULTS)
    trained, expected = (load_file(path / "model.safetensors") for path in (folder, undisturbed))
    assert all(trained[name].equal(expected[name]) for name in expected)
    said = capsys.readouterr()
    assert f"everything is in {folder}" in said.out
    assert "Traceback" not in said.err
    # The state at the end, and the one command.
    assert f"The folder {folder} is complete and unchanged" in said.err
    command = shlex.split(said.err.strip().splitlines()[-1])
    assert command[:2] == ["ham-hf", "push"]
    hub.faults.clear()
    recipe_module("push.py").main(command[2:])
    assert "pushed to" in capsys.readouterr().out
    tree = hub.model("me/robust").tree()
    published = {path for path in tree if path != ".gitattributes"}
    assert published >= {"README.md", "report.json", "model.safetensors", "figures/per_class_accuracy.png"}
    assert all(tree[path].data == (folder / path).read_bytes() for path in published)


# Reading


@pytest.fixture
def published(hub: Hub, folder: Path) -> Hub:
    hub.add("model", "me/robust", content(folder))
    limit_waiting()  # as the recipes do
    return hub


READING = {**FAULTS, "cut": lambda hub, pattern: hub.disturb("cut", pattern, times=ALWAYS)}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("fault", [fault for fault in READING if fault not in ("409", "412")])
def test_a_model_that_cannot_be_read_is_an_error_that_names_it(published: Hub, fault: str, file: str) -> None:
    READING[fault](published, f"(GET|HEAD) .*{file}")
    with pytest.raises(ValueError, match=rf"hf-hub:me/robust: could not get {re.escape(file)} of me/robust"):
        resolve_source("hf-hub:me/robust").read_weights()
    published.faults.clear()
    assert "fc.weight" in resolve_source("hf-hub:me/robust").read_weights()


@pytest.mark.parametrize("fault", ["429", "reset", "lost answer", "hanging", "cut"])
def test_a_download_with_a_fault_that_passes_is_whole(published: Hub, folder: Path, fault: str) -> None:
    READING[fault](published, "GET .*model.safetensors")
    published.faults[-1].times = 1
    weights = resolve_source("hf-hub:me/robust").read_weights()
    expected = load_file(folder / "model.safetensors")
    assert all(weights[name].equal(expected[name]) for name in expected)
