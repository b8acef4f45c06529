"""Results as the Hub reads them, and the links that it makes tags of."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from ham_hf.config import parse_evaluate_config
from ham_hf.evaluation_run import shell_command
from ham_hf.reporting.eval_results import write_eval_results
from tests.support.example_report import make_report, with_dataset


def test_results_go_through_the_client_and_come_back(tmp_path: Path) -> None:
    report = with_dataset(make_report(), hub_id="uoft-cs/cifar10", revision="a" * 40)
    path = write_eval_results(report, tmp_path)
    assert path == tmp_path / ".eval_results" / "uoft-cs-cifar10.yaml"
    entries = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(path.read_text()))}
    for attack in report.entries():
        average, worst = entries[attack.name], entries[f"{attack.name}_worst_class"]
        assert average.value == pytest.approx(attack.summary.average, abs=1e-6)
        assert worst.value == pytest.approx(attack.summary.worst_class, abs=1e-6)
        assert report.dataset.class_names[attack.summary.worst_class_index] in worst.notes
        assert (average.dataset_id, average.dataset_revision) == ("uoft-cs/cifar10", "a" * 40)
        assert ("epsilon 8/255" in average.notes) is (attack.name != "clean")
    assert len(entries) == 2 * len(report.entries())


def test_local_images_have_no_results_on_the_hub(tmp_path: Path) -> None:
    assert write_eval_results(with_dataset(make_report(), hub_id=None), tmp_path) is None
    assert not (tmp_path / ".eval_results").exists()


def test_the_command_of_an_evaluation_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "patients").mkdir()
    words = [str(tmp_path / "patients"), "--dataset_name=digits", "--eval_num_steps=5", "--output_dir=/secret/place"]
    command = shell_command(parse_evaluate_config([*words, "--foreign_attack", "/secret/mine.py:attack"]))
    assert command.endswith("patients --dataset_name=digits --eval_num_steps=5 --foreign_attack mine.py:attack")
    assert str(tmp_path) not in command
    assert "secret" not in command
