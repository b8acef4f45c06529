"""An evaluation goes into somebody's repository as a pull request, and replaces nothing that it should not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries

from ham_hf import push_run
from ham_hf.commands import push
from ham_hf.config import parse_evaluate_config
from ham_hf.hub import PushError, check_pull_request, push_evaluation
from ham_hf.reporting.card import evaluation_document
from ham_hf.reporting.eval_results import write_eval_results
from ham_hf.reporting.figures import save_figures
from ham_hf.reporting.report import read_report, write_report
from tests.support.example_report import make_examples, make_report, with_dataset
from tests.support.hub_server import Hub, use_hub

pytestmark = pytest.mark.slow

SAID = "<!-- images of the dataset -->"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that this process talks to as "me", with a model and a dataset of somebody else."""
    with Hub({"hf_writer": "me"}) as server:
        use_hub(server, monkeypatch, tmp_path / "hf_home", "hf_writer")
        server.add("model", "you/theirs", {})
        server.add("dataset", "you/open", {})
        yield server


def evaluated(folder: Path, hub_id: str) -> None:
    """The folder of an evaluation, with an image of the dataset in a figure."""
    report = with_dataset(make_report(trained=False), name=hub_id, hub_id=hub_id)
    write_report(report, folder)
    examples = make_examples(2, in_chans=3, num_classes=10)
    save_figures(report, folder, examples=examples, train_log=())
    (folder / "EVALUATION.md").write_text(evaluation_document(report, folder, command="ham-hf evaluate you/theirs"))
    write_eval_results(report, folder, suffix="-evaluation")


def test_an_evaluation_becomes_a_pull_request_in_a_repository_of_somebody_else(hub: Hub, tmp_path: Path) -> None:
    evaluated(tmp_path, "you/open")
    repo = hub.model("you/theirs")
    before = repo.resolve("main")
    check_pull_request("you/theirs")
    url = push_evaluation(tmp_path, "you/theirs", create_pr=True)
    assert url == f"{hub.url}/you/theirs/discussions/1"
    assert repo.resolve("main") == before
    tree = repo.tree("refs/pr/1")
    assert {"report.json", "EVALUATION.md", "figures/adversarial_examples.png"} <= tree.keys()
    entries = parse_eval_result_entries(yaml.safe_load(tree[".eval_results/you-open-evaluation.yaml"].data))
    assert {entry.dataset_id for entry in entries} == {"you/open"}
    with pytest.raises(PushError, match=r"(?s)may not write.*--hub_model_id you/theirs\Z"):
        push_evaluation(tmp_path, "you/theirs", create_pr=False)


def test_a_repository_keeps_the_report_of_its_training(hub: Hub, tmp_path: Path) -> None:
    evaluated(tmp_path / "evaluation", "you/open")
    trained = write_report(make_report(), tmp_path / "trained")
    HfApi().create_repo("me/robust")
    HfApi().upload_file(path_or_fileobj=trained, path_in_repo="report.json", repo_id="me/robust")
    push_evaluation(tmp_path / "evaluation", "me/robust", create_pr=False)
    tree = hub.model("me/robust").tree("main")
    assert tree["report.json"].data == trained.read_bytes()
    for name in ("report.json", "EVALUATION.md", "figures/per_class_accuracy.png"):
        assert f"evaluation/{name}" in tree
    assert ".eval_results/you-open-evaluation.yaml" in tree


def test_images_that_are_not_public_stay_out_of_evaluations(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    evaluated(folder, "you/closed")
    push_evaluation(folder, "you/theirs", create_pr=True)
    push_evaluation(folder, "you/theirs", create_pr=True, publish_images=True)
    hidden, shown = (hub.model("you/theirs").tree(f"refs/pr/{number}") for number in (1, 2))
    assert shown.keys() - hidden.keys() == {"figures/adversarial_examples.png"}
    assert SAID in (folder / "EVALUATION.md").read_text()
    assert SAID not in hidden["EVALUATION.md"].data.decode()
    assert shown["EVALUATION.md"].data == (folder / "EVALUATION.md").read_bytes()


def test_a_pull_request_that_fails_names_the_command_that_opens_it(hub, tmp_path, capsys):
    folder = tmp_path / "evaluation"
    evaluated(folder, "you/open")
    hub.fail("POST .*/commit/", status=503)
    with pytest.raises(PushError, match=r"push \S+evaluation --hub_model_id you/theirs --create_pr"):
        push_evaluation(folder, "you/theirs", create_pr=True)
    push.main([str(folder), "--hub_model_id=you/theirs", "--create_pr"])
    assert "discussions/1" in capsys.readouterr().out
    assert read_report(folder).training is None


@pytest.mark.parametrize("flags", ["--hub_space", "--model_license mit", "--create_pr --hub_private_repo"])
def test_flags_that_have_no_effect_on_an_evaluation_are_refused(tmp_path, monkeypatch, capsys, flags):
    evaluated(tmp_path, "you/open")
    monkeypatch.setattr(push_run, "check_target", lambda *_, **__: pytest.fail("too early"))
    with pytest.raises(SystemExit):
        push.main([str(tmp_path), "--hub_model_id=you/theirs", *flags.split()])
    said = capsys.readouterr().err
    assert "is not for a pull request" in said if "pr" in flags else "is not for the folder of an evaluation" in said


def test_a_pull_request_that_could_not_be_opened_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--create_pr: there is no model you/gone"):
        check_pull_request("you/gone")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="--create_pr needs a token"):
        check_pull_request("you/theirs")


def test_the_repository_is_that_of_the_model() -> None:
    base = ["--dataset_name=digits", "--push_to_hub"]
    assert parse_evaluate_config(["hf-hub:you/theirs@v2", *base]).repo_id == "you/theirs"
    assert parse_evaluate_config(["./", *base, "--hub_model_id=me/x"]).repo_id == "me/x"
