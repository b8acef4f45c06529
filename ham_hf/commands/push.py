"""Push the output folder of a finished run to the Hub, again if a push has failed; or repair an older export.

    ham-hf push outputs/cifar10-ham --hub_model_id me/robust-cifar10
    ham-hf push outputs/cifar10-ham --hub_model_id me/robust-cifar10 --hub_space
    ham-hf push outputs/cifar10-ham --repair
    ham-hf push me/robust-cifar10 --repair
    ham-hf push evaluation/their-model --hub_model_id you/their-model --create_pr

--repair updates an export of an earlier version to the current form, which transformers loads too: config.json names
the number of classes once, and a network for gray images gets a second form in rgb/. The weights do not change. A
folder is repaired in place (and pushed then, if --hub_model_id is given), a repository on the Hub with one commit.
The folder of an evaluation goes into the repository of the model. With --create_pr that, or the repair of a
repository on the Hub, is a pull request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ham_hf.config.command_line import with_underscores
from ham_hf.hub_config import DEFAULT_REVISION, HubConfig
from ham_hf.invocation import command_parser
from ham_hf.settings import settings_of
from ham_hf.terminal import set_up_logging
from ham_hf.training.environment import process_rank


def main(argv: Sequence[str] | None = None) -> None:
    """Push or repair from the command line ``argv`` (None: the process's)."""
    set_up_logging(process_rank())
    options = _parser().parse_args(map(with_underscores, sys.argv[1:] if argv is None else argv))
    # Only now: torch and timm take seconds to import, and --help needs none of them.
    from ham_hf.push_run import run_push

    run_push(options)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("push", __doc__)
    parser.add_argument(
        "folder",
        type=Path,
        help="output folder of a finished run; with --repair also owner/name of a model on the Hub",
    )
    shared = {known.name: known for known in settings_of(HubConfig)}
    parser.add_argument("--hub_model_id", help=shared["hub_model_id"].help)
    for name in ("hub_private_repo", "publish_images", "hub_space"):
        parser.add_argument(f"--{name}", action="store_true", help=shared[name].help)
    parser.add_argument("--hub_revision", default=DEFAULT_REVISION, help=shared["hub_revision"].help)
    parser.add_argument("--model_license", help="license of the weights; default: that of the run's settings")
    parser.add_argument("--create_pr", action="store_true", help="push an evaluation or a repair as a pull request")
    parser.add_argument("--repair", action="store_true", help="update an older export to the current form first")
    return parser
