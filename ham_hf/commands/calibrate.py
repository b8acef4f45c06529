"""Make a robust model fairer without training: class shifts, the full evaluation, a model for plain timm, its card."""

from __future__ import annotations

from collections.abc import Sequence

from ham_hf.config.command_line import parse_calibrate_config
from ham_hf.terminal import set_up_logging
from ham_hf.training.environment import process_rank


def main(argv: Sequence[str] | None = None) -> None:
    """Run one calibration from the command line ``argv`` (None: the process's)."""
    set_up_logging(process_rank())
    config = parse_calibrate_config(argv)
    # Only now: torch and timm take seconds to import, and --help needs none of them.
    from ham_hf.calibration_run import calibrate
    from ham_hf.evaluation_run import in_its_folder

    in_its_folder(config, calibrate)
