# /// script
# dependencies = ["ham-hf"]
# ///
"""Push the output folder of a finished run to the Hub, again if a push has failed.

python recipes/push.py outputs/cifar10-ham --hub_model_id me/robust-cifar10
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ham_hf.faults import clean_exit
from ham_hf.hub import PushError, check_write_access, push_folder
from ham_hf.reporting.card import write_card
from ham_hf.reporting.report import REPORT_NAME, read_report
from ham_hf.training.launching import set_up_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Push one folder from the command line ``argv`` (None: the process's)."""
    set_up_logging()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="output folder of a finished run")
    parser.add_argument("--hub_model_id", "--hub-model-id", required=True, help="repository on the Hub: owner/name")
    parser.add_argument("--hub_private_repo", "--hub-private-repo", action="store_true", help="create it private")
    parser.add_argument("--hub_revision", "--hub-revision", default="main", help="branch to push to")
    parser.add_argument(
        "--model_license", "--model-license", help="license of the weights; default: that of the run's settings"
    )
    arguments = parser.parse_args(argv)
    with clean_exit(ValueError, OSError, PushError):
        missing = [
            name
            for name in ("model.safetensors", "config.json", REPORT_NAME)
            if not (arguments.folder / name).is_file()
        ]
        if missing:
            raise ValueError(f"{arguments.folder} is not the folder of a finished run: {', '.join(missing)} missing")
        report = read_report(arguments.folder / REPORT_NAME)
        model_license = arguments.model_license or report.config.get("model_license")
        if report.training is None or not isinstance(model_license, str):
            raise ValueError(
                f"{arguments.folder} holds no training: its {REPORT_NAME} lacks "
                + ("a training section" if report.training is None else "the license; name it with --model_license")
            )
        repo_id = check_write_access(
            arguments.hub_model_id, private=arguments.hub_private_repo, revision=arguments.hub_revision
        )
        # The card's loading lines name the repository, which may be another one than the run knew of.
        write_card(report, arguments.folder, repo_id=repo_id, model_license=model_license)
        url = push_folder(
            arguments.folder,
            repo_id,
            private=arguments.hub_private_repo,
            revision=arguments.hub_revision,
            commit_message="Robust model",
        )
    sys.stdout.write(f"pushed to {url}\n")


if __name__ == "__main__":
    main()
