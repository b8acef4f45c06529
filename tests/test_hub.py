"""Pushes over real HTTP to a stand-in Hub: rights, faults, repetition, and what a stranger can load afterwards."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, constants, get_token

from ham_hf.hub import PushError, check_write_access, push_folder, try_push
from ham_hf.reporting.card import write_card
from ham_hf.reporting.figures import save_figures
from ham_hf.reporting.page import PageRun, has_images, page_html, without_images
from ham_hf.reporting.report import read_report, write_report
from tests.support.example_report import DIGITS, make_report, one_example, with_dataset, with_model
from tests.support.hub_server import BOTH_WAYS, Hub, content, use_hub

WRITER, READER, STRANGER = "hf_writer0123456789", "hf_reader0123456789", "hf_stranger0123456789"
TOKENS = {WRITER: "me", READER: "me", STRANGER: "you"}
FIGURES = ("per_class_accuracy", "training_curves", "confusion_pgd-20", "confusion_cw-20")
PUSHED = {
    *("README.md", "config.json", "metrics.jsonl", "model.safetensors", "predictions.parquet", "report.html"),
    *("report.json", "train_config.yaml", *(f"figures/{name}.png" for name in FIGURES)),
}
STRIP = "figures/adversarial_examples.png"
IMAGES = {STRIP, "image.png"}


@pytest.fixture
def hub(request, monkeypatch, tmp_path, waits):
    """A Hub that this process talks to as "me"."""
    pipeline = getattr(request, "param", None) == "pipeline"
    with Hub(TOKENS, read_only={READER}) as server:
        use_hub(server, monkeypatch, tmp_path / "hf_home", WRITER, pipeline=pipeline)
        yield server


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a finished run: what is published, and what is not."""
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    data_config = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"}
    names = {"label_names": list(DIGITS)}
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_config=names, data_config=data_config)
    report = with_model(make_report(), architecture="test_resnet", upsample=1)
    write_report(report, folder)
    save_figures(report, folder, examples=None, train_log=())
    write_card(report, folder, repo_id="me/robust", model_license="apache-2.0")
    (folder / "predictions.parquet").write_bytes(b"PAR1")
    (folder / "report.html").write_text(page_html([PageRun(label="robust", report=report, examples=one_example())]))
    (folder / "examples.parquet").write_bytes(b"images of the dataset")
    (folder / "train_config.yaml").write_text("method: ham\n")
    (folder / "metrics.jsonl").write_text("{}\n")
    for name in ("checkpoint-10/model.safetensors", "checkpoint-10/optimizer.bin", "figures/notes.txt", "random.pkl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for publication")
    return content(folder)


@pytest.fixture
def folder(finished: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "output"
    for name, data in finished.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def assert_published(hub: Hub, folder: Path, *, revision: str = "main") -> None:
    tree = hub.model("me/robust").tree(revision)
    assert set(tree) == PUSHED | {".gitattributes"}
    for name in PUSHED:
        assert tree[name].data == (folder / name).read_bytes(), name


def test_access_check_creates_repository_and_branch(hub: Hub) -> None:
    assert check_write_access("robust", private=False) == "me/robust"
    assert check_write_access("me/robust", private=False, revision="v1") == "me/robust"
    assert check_write_access("me/robust", private=False, revision="v1") == "me/robust"
    assert not hub.model("me/robust").private
    assert set(hub.model("me/robust").refs) == {"main", "v1"}
    assert check_write_access("secret", private=True) == "me/secret"
    assert hub.model("me/secret").private
    assert check_write_access("secret", private=True) == "me/secret"


@pytest.mark.parametrize(
    ("token", "repo_id", "private", "revision", "message"),
    [
        (None, "robust", False, "main", r"--push_to_hub needs a token .* `hf auth login`"),
        ("hf_unknown0123456789", "robust", False, "main", r"does not accept the token.*renew HF_TOKEN"),
        (READER, "me/public", False, "main", r"--hub_model_id me/public: the token may not write"),
        (STRANGER, "me/public", False, "main", r"--hub_model_id me/public: the token may not write"),
        (STRANGER, "me/new", False, "main", r"--hub_model_id me/new: the token may not write"),
        (WRITER, "", False, "main", r"needs --hub_model_id"),
        (WRITER, "a b", False, "main", r"--hub_model_id 'a b': expected owner/name"),
        (WRITER, "a/b/c", False, "main", r"--hub_model_id 'a/b/c': expected owner/name"),
        (WRITER, "a--b/c..d", False, "main", r"--hub_model_id 'a--b/c..d': expected owner/name of at most 96 letters"),
        (WRITER, "me/" + 94 * "x", False, "main", r"expected owner/name of at most 96 letters"),
        (WRITER, "public", True, "main", r"--hub_private_repo: me/public exists and is public"),
        (WRITER, "public", False, "refs/pr/1", r"--hub_revision 'refs/pr/1': expected the name of a branch"),
        (WRITER, "public", False, "a b", r"--hub_revision a b: the Hub refused"),
    ],
)
def test_a_push_that_could_not_work_is_refused(hub, monkeypatch, token, repo_id, private, revision, message):
    """Before training begins."""
    check_write_access("me/public", private=False)
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=message) as caught:
        check_write_access(repo_id, private=private, revision=revision)
    assert "hf_" not in str(caught.value)


@pytest.mark.faults(quick=True)
def test_an_unreachable_hub_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    with pytest.raises(ValueError, match=rf"cannot reach {gone.url}.*train without --push_to_hub"):
        check_write_access("robust", private=False)


@pytest.mark.faults(quick=True)
def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--push_to_hub: HF_HUB_OFFLINE is set"):
        check_write_access("robust", private=False)
    assert hub.log == []


def test_a_busy_hub_is_asked_again(hub: Hub, waits: list[float]) -> None:
    hub.fail("repos/create", status=503, times=1)
    hub.disturb("drop", "branch/main", times=1)
    assert check_write_access("robust", private=False) == "me/robust"
    assert waits[:2] == [1, 1]


@BOTH_WAYS
@pytest.mark.parametrize("private", [False, True])
def test_push_publishes_the_artifacts_and_nothing_else(hub: Hub, folder: Path, private: bool) -> None:
    repo_id = check_write_access("robust", private=private)
    url = push_folder(folder, repo_id, commit_message="Robust digits")
    assert_published(hub, folder)
    newest = hub.model("me/robust").history()[0]
    assert url == f"{hub.url}/me/robust/commit/{newest.id}"
    assert newest.title == "Robust digits"
    info = HfApi().model_info(repo_id)
    assert info.card_data.eval_results[0].metric_name == "Clean accuracy"
    assert info.private is private
    assert HfApi(token=False).repo_exists(repo_id) is not private


@pytest.mark.parametrize(
    ("dataset", "shown"), [("/data/patients", False), ("me/open", True), ("me/closed", False), ("me/gone", False)]
)
def test_images_are_published_of_public_datasets_alone(hub, folder, dataset, shown):
    repo_id = check_write_access("robust", private=False)
    for name in ("open", "closed"):
        HfApi().create_repo(f"me/{name}", repo_type="dataset", private=name == "closed")
    hub_id = None if dataset.startswith("/") else dataset
    write_report(with_dataset(read_report(folder), name=dataset, hub_id=hub_id), folder)
    for name in IMAGES:
        (folder / name).write_bytes(b"images of the dataset")
    write_card(read_report(folder), folder, repo_id=repo_id, model_license="apache-2.0")
    assert STRIP in (folder / "README.md").read_text()
    before = content(folder)
    push_folder(folder, repo_id, space=True)
    tree, page = hub.model("me/robust").tree("main"), hub.repos["space", "me/robust"].tree()["index.html"].data
    assert set(tree) == PUSHED | {".gitattributes"} | (IMAGES if shown else set())
    assert content(folder) == before
    html, card = tree["report.html"].data.decode(), tree["README.md"].data.decode()
    assert has_images(html) is has_images(page.decode()) is shown
    assert html == (before["report.html"].decode() if shown else without_images(before["report.html"].decode()))
    assert (STRIP in card) is ("`image.png`, in the same folder" in card) is shown
    assert card.count("\n## ") == before["README.md"].decode().count("\n## ")
    assert "figures/per_class_accuracy.png" in card
    push_folder(folder, repo_id, publish_images=True, space=True)
    tree, page = hub.model("me/robust").tree("main"), hub.repos["space", "me/robust"].tree()["index.html"].data
    assert {name: tree[name].data for name in PUSHED | IMAGES} == {name: before[name] for name in PUSHED | IMAGES}
    assert has_images(page.decode())


@pytest.mark.parametrize("private", [False, True])
def test_a_space_shows_the_page_and_links_the_model_and_back(hub: Hub, folder: Path, private: bool) -> None:
    repo_id = check_write_access("robust", private=private, space=True)
    assert ("space", repo_id) not in hub.repos  # nothing is made before there is something to show
    report = read_report(folder)
    report = dataclasses.replace(report, config={**report.config, "hub_space": True})
    write_card(report, folder, repo_id=repo_id, model_license="apache-2.0")
    before = content(folder)
    push_folder(folder, repo_id, space=True)
    space = hub.repos["space", repo_id]
    assert space.private is private
    about, page = (space.tree()[name].data.decode() for name in ("README.md", "index.html"))
    metadata = yaml.safe_load(about.split("---")[1])
    assert (metadata["sdk"], metadata["app_file"], metadata["models"]) == ("static", "index.html", [repo_id])
    assert len(metadata["short_description"]) <= 60
    for text in (about, page):
        assert f"https://huggingface.co/{repo_id}" in text
    assert f"https://huggingface.co/spaces/{repo_id}" in (folder / "README.md").read_text()
    assert content(folder) == before
    count = len(space.history())
    assert check_write_access("robust", private=private, space=True) == repo_id
    push_folder(folder, repo_id, space=True)
    assert len(space.history()) == count


def test_a_space_of_somebody_else_or_one_that_all_can_see_is_left_alone(hub: Hub, folder: Path) -> None:
    for name in ("demo", "open"):
        HfApi().create_repo(f"me/{name}", repo_type="space", space_sdk="static")
    api = HfApi()
    api.upload_file(path_or_fileobj=b"app", path_in_repo="app.py", repo_id="me/demo", repo_type="space")
    for name, private, message in (("demo", False, "did not write"), ("open", True, "is public and the model is")):
        with pytest.raises(ValueError, match=message):
            check_write_access(name, private=private, space=True)
        repo_id = check_write_access(name, private=private)
        before = hub.repos["space", repo_id].tree()
        with pytest.raises(PushError, match=message):
            push_folder(folder, repo_id, space=True)
        assert hub.repos["space", repo_id].tree() == before
        assert "model.safetensors" in hub.model(repo_id).tree()


@pytest.mark.faults(quick=True)
def test_a_space_that_fails_loses_nothing_and_is_pushed_again(hub: Hub, folder: Path) -> None:
    repo_id = check_write_access("robust", private=True, space=True)
    before = content(folder)
    hub.fail("POST /api/spaces/.*/commit/", status=403, times=1000)
    with pytest.raises(PushError, match="to the Space me/robust failed") as caught:
        push_folder(folder, repo_id, private=True, space=True)
    command = f"    ham-hf push {folder} --hub_model_id me/robust --hub_private_repo --hub_space"
    assert str(caught.value).endswith(command)
    assert content(folder) == before
    assert_published(hub, folder)
    hub.faults.clear()
    hub.fail("POST /api/spaces/.*/commit/", status=503)
    push_folder(folder, check_write_access("robust", private=True, space=True), private=True, space=True)
    assert "index.html" in hub.repos["space", repo_id].tree()
    (folder / "report.html").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no report\.html"):
        push_folder(folder, repo_id, space=True)


def test_push_to_a_branch_leaves_main_alone(hub: Hub, folder: Path) -> None:
    repo_id = check_write_access("robust", private=False, revision="v1")
    push_folder(folder, repo_id, revision="v1")
    assert_published(hub, folder, revision="v1")
    assert set(hub.model("me/robust").tree("main")) == {".gitattributes"}


@BOTH_WAYS
def test_pushing_again_commits_only_changes(hub: Hub, folder: Path) -> None:
    repo_id = check_write_access("robust", private=False)
    first = push_folder(folder, repo_id)
    assert push_folder(folder, repo_id) == first
    assert len(hub.model("me/robust").history()) == 2
    (folder / "metrics.jsonl").write_text("{}\n{}\n")
    second = push_folder(folder, repo_id)
    assert second != first
    assert_published(hub, folder)
    assert len(hub.model("me/robust").history()) == 3


@pytest.mark.faults(quick=True)
def test_the_command_that_repeats_a_push_keeps_branch_and_privacy(hub: Hub, folder: Path) -> None:
    repo_id = check_write_access("robust", private=True, revision="v1")
    del hub.repos["model", repo_id]  # somebody deleted it: the command makes it again
    with pytest.raises(PushError) as caught:
        push_folder(folder, repo_id, private=True, revision="v1", model_license="mit")
    command = (
        f"    ham-hf push {folder} --hub_model_id me/robust --hub_private_repo --hub_revision v1 --model_license mit"
    )
    assert str(caught.value).endswith(command)


def test_metadata_that_the_hub_refuses_is_a_push_error(hub: Hub, folder: Path) -> None:
    repo_id = check_write_access("robust", private=False)
    (folder / "README.md").write_text("---\nmodel-index: 3\n---\n")
    with pytest.raises(PushError, match=r"Invalid metadata in README\.md"):
        push_folder(folder, repo_id)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_folder_without_a_model_is_refused(hub: Hub, folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}"):
        push_folder(folder, "me/robust")
    assert hub.log == []


def test_the_token_appears_nowhere(hub, folder, monkeypatch, caplog):
    def leak(*_: object, **__: object) -> None:
        raise ConnectionError(f"Authorization: Bearer {get_token()} and {STRANGER}")

    caplog.set_level(logging.DEBUG)
    repo_id = check_write_access("robust", private=False)
    push_folder(folder, repo_id)
    monkeypatch.setenv("HF_TOKEN", "eyJ-a-token-of-another-shape")
    monkeypatch.setattr(HfApi, "create_commit", leak)
    assert not try_push(folder, repo_id)
    with pytest.raises(PushError) as caught:
        push_folder(folder, repo_id)
    monkeypatch.setattr(HfApi, "create_repo", leak)
    with pytest.raises(ValueError, match="cannot reach") as refused:
        check_write_access("robust", private=False)
    texts = [caplog.text, str(caught.value), str(refused.value), *map(str, content(folder).values())]
    texts += [str(blob.data) for blob in hub.model("me/robust").tree().values()]
    assert not [token for token in (*TOKENS, get_token()) for text in texts if token in text]
    assert "***" in str(caught.value)
