"""What report, card and figure say of a calibration."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from ham_hf.evaluation.calibration import frontier_point
from ham_hf.reporting.calibration import CalibrationReport, exchange_sentence, training_images_note
from ham_hf.reporting.card import write_card
from ham_hf.reporting.figures import save_figures
from ham_hf.reporting.report import read_report, write_report
from tests.support.example_report import make_report, with_model


def calibration(**changes) -> CalibrationReport:
    points = [frontier_point(f, [20 + int(40 * f), *[60] * 8, 90 - int(60 * f)], [100] * 10) for f in (0.0, 0.5, 1.0)]
    values = {
        "fairness": 0.5,
        "max_average_drop": None,
        "shifts": tuple(0.1 * index - 0.45 for index in range(10)),
        "factors": (0.94,) * 10,
        "counts": (100,) * 10,
        "frontier": tuple(points),
        "attack": {"num_steps": 10},
        "images": "100 images | of a split",
        "seen_in_training": False,
        "seconds": 3.0,
        "passes": 1000,
        "tags": ("strong", "timm"),
    }
    return CalibrationReport(**{**values, **changes})


def calibrated(**changes):
    """A report of a stranger's model with shifts."""
    report = with_model(make_report(trained=False), name="strong", base_model="them/strong")
    return dataclasses.replace(report, calibration=calibration(**changes))


def test_report_comes_back_equal(tmp_path):
    write_report(calibrated(), tmp_path)
    assert read_report(tmp_path) == calibrated()


def test_what_was_given_for_what():
    assert exchange_sentence(calibration()) == (
        "Fairness 0.5 took the worst class from 20.0 % to 40.0 % and the worst 30 % of the classes from 46.7 % to "
        "53.3 %, for 1.0 points of the average (59.0 % before, 58.0 % after), counted on images that the shifts were "
        "not found on."
    )
    assert "leaves the model as it was" in exchange_sentence(calibration(fairness=0.0))


def test_card_of_a_stranger(tmp_path):
    save_figures(calibrated(), tmp_path, examples=None, train_log=[])
    text = write_card(calibrated(), tmp_path, repo_id=None, model_license="mit").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "them/strong"
    assert metadata["license"] == "mit"
    assert metadata["tags"].count("timm") == 1
    assert {"strong", "class-shifts"} <= set(metadata["tags"])
    assert "the weights of [`them/strong`](https://huggingface.co/them/strong)" in text
    assert exchange_sentence(calibration()) in text
    assert "| 0.5 (this model) | 58.0 (54.9–61.0) | 40.0 (" in text
    assert "figures/fairness_frontier.png" in text
    assert "zero -0.45" in text
    assert r"100 images \| of a split" in text
    assert "menon2021longtail" in text
    assert "lin2025ham" not in text
    assert "## Training" not in text


def test_card_of_a_run_of_ours(tmp_path):
    report = dataclasses.replace(make_report(), calibration=calibration())
    text = write_card(report, tmp_path, repo_id=None, model_license="mit").read_text()
    assert text.index("## Calibration") < text.index("## Training")
    assert "lin2025ham" in text
    assert "menon2021longtail" in text


def test_nothing_is_said_without_shifts(tmp_path):
    text = write_card(make_report(), tmp_path, repo_id=None, model_license="mit").read_text()
    assert "## Calibration" not in text
    assert "class-shifts" not in text
    assert "menon" not in text


def test_a_report_of_an_evaluation_alone_has_no_card(tmp_path):
    with pytest.raises(ValueError, match="no training or calibration"):
        write_card(make_report(trained=False), tmp_path, repo_id=None, model_license="mit")


def test_training_images_are_said_aloud():
    assert training_images_note(calibration()) is None
    assert "images that the model was trained on" in training_images_note(calibration(seen_in_training=True))
