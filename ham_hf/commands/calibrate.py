"""Make a robust model fairer without training: class shifts, the full evaluation, a model for plain timm, its card."""

from __future__ import annotations

from collections.abc import Sequence

from ham_hf.calibration_run import calibrate
from ham_hf.config.command_line import parse_calibrate_config
from ham_hf.evaluation_run import in_its_folder
from ham_hf.hub_requests import limit_waiting
from ham_hf.training.launch import set_up_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Run one calibration from the command line ``argv`` (None: the process's)."""
    set_up_logging()
    limit_waiting()
    in_its_folder(parse_calibrate_config(argv), calibrate)
