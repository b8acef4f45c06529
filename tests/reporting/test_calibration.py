"""What a report says of a calibration; its card is among the golden documents."""

from __future__ import annotations

from ham_hf.reporting.method_text import exchange_sentence, training_images_note
from ham_hf.reporting.report import read_report, write_report
from tests.support.documents import calibrated, calibration


def test_report_comes_back_equal(tmp_path):
    write_report(calibrated(), tmp_path)
    assert read_report(tmp_path) == calibrated()


def test_what_was_given_for_what():
    assert exchange_sentence(calibration()) == (
        "Fairness 0.5 took the worst class from 20.0 % to 40.0 % and the worst 30 % of the classes from 46.7 % to "
        "53.3 %, for 1.0 points of the average (59.0 % before, 58.0 % after), counted on images that the shifts were "
        "not found on."
    )
    assert "leaves the model unchanged" in exchange_sentence(calibration(fairness=0.0))


def test_training_images_are_said_aloud():
    assert training_images_note(calibration()) is None
    assert "images that the model was trained on" in training_images_note(calibration(seen_in_training=True))
