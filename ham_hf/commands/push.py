"""Push the output folder of a finished run to the Hub, again if a push has failed; or repair an older export.

    ham-hf push outputs/cifar10-ham --hub_model_id me/robust-cifar10
    ham-hf push outputs/cifar10-ham --hub_model_id me/robust-cifar10 --hub_space
    ham-hf push outputs/cifar10-ham --repair
    ham-hf push me/robust-cifar10 --repair
    ham-hf push evaluation/their-model --hub_model_id you/their-model --create_pr

--repair brings what an earlier version wrote into today's form, which transformers loads too: config.json names the
number of classes once, and a network for gray images gets a second form in rgb/. The weights stay as they are. A
folder is repaired in place (and pushed then, if --hub_model_id is given), a repository on the Hub with one commit.
The folder of an evaluation goes into the repository of the model, with --create_pr as a pull request.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ham_hf.faults import clean_exit
from ham_hf.hub import (
    EVALUATION_NAME,
    PushError,
    check_pull_request,
    check_write_access,
    download_file,
    push_evaluation,
    push_files,
    push_folder,
    space_url,
)
from ham_hf.invocation import command, program
from ham_hf.models.export import REPAIR_READS, REPAIR_WRITES, repair_folder
from ham_hf.reporting.card import write_card
from ham_hf.reporting.eval_results import write_eval_results
from ham_hf.reporting.page import PAGE_NAME
from ham_hf.reporting.report import REPORT_NAME, read_report
from ham_hf.terminal import show
from ham_hf.training.launch import set_up_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Push or repair from the command line ``argv`` (None: the process's)."""
    set_up_logging()
    arguments = _parser().parse_args(argv)
    with clean_exit(ValueError, OSError, PushError, RuntimeError):
        folder, repo_id = arguments.folder, arguments.hub_model_id
        if not arguments.repair and repo_id is None:
            raise ValueError("--hub_model_id is missing: the repository to push to, owner/name")
        if arguments.repair and not folder.is_dir():
            _repair_on_hub(str(folder), arguments)
            return
        if arguments.repair:
            _print_changes(str(folder), repair_folder(folder))
        if repo_id is not None and (folder / EVALUATION_NAME).is_file():
            _push_evaluation(folder, arguments)
        elif repo_id is not None:
            _push(folder, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("push"),
        description=(__doc__ or "").replace("ham-hf push", command("push")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="output folder of a finished run; with --repair also owner/name of a model on the Hub",
    )
    parser.add_argument("--hub_model_id", "--hub-model-id", help="repository on the Hub: owner/name")
    parser.add_argument("--hub_private_repo", "--hub-private-repo", action="store_true", help="create it private")
    parser.add_argument(
        "--publish_images",
        "--publish-images",
        action="store_true",
        help="push the images of a dataset that is not public too",
    )
    parser.add_argument(
        "--hub_space",
        "--hub-space",
        action="store_true",
        help="publish report.html as a static Space of the same owner/name too",
    )
    parser.add_argument("--hub_revision", "--hub-revision", default="main", help="branch to push to")
    parser.add_argument(
        "--model_license", "--model-license", help="license of the weights; default: that of the run's settings"
    )
    parser.add_argument(
        "--create_pr", "--create-pr", action="store_true", help="push the folder of an evaluation as a pull request"
    )
    parser.add_argument("--repair", action="store_true", help="bring an older export into today's form first")
    return parser


def _push_evaluation(folder: Path, arguments: argparse.Namespace) -> None:
    repo_id, create_pr, revision = arguments.hub_model_id, arguments.create_pr, arguments.hub_revision
    if create_pr:
        check_pull_request(repo_id)
    else:
        repo_id = check_write_access(repo_id, private=arguments.hub_private_repo, revision=revision)
    url = push_evaluation(
        folder, repo_id, create_pr=create_pr, publish_images=arguments.publish_images, revision=revision
    )
    show(f"pushed to {url}\n")


def _push(folder: Path, arguments: argparse.Namespace) -> None:
    if arguments.create_pr:
        raise ValueError(f"--create_pr is for the folder of an evaluation, and {folder} has no {EVALUATION_NAME}")
    missing = [name for name in ("model.safetensors", "config.json", REPORT_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is not the folder of a finished run: {', '.join(missing)} missing")
    report = read_report(folder / REPORT_NAME)
    model_license = arguments.model_license or report.config.get("model_license")
    made_here = report.training is not None or report.calibration is not None
    if not made_here or not isinstance(model_license, str):
        raise ValueError(
            f"{folder} holds no training: its {REPORT_NAME} lacks "
            + ("the license; name it with --model_license" if made_here else "a training section")
        )
    revision = arguments.hub_revision
    space = arguments.hub_space
    if space:
        if not (folder / PAGE_NAME).is_file():
            raise ValueError(f"--hub_space: {folder} has no {PAGE_NAME}; write it with {command('page')} {folder}")
        report = replace(report, config={**report.config, "hub_space": True})
    repo_id = check_write_access(
        arguments.hub_model_id, private=arguments.hub_private_repo, revision=revision, space=space
    )
    # The card's loading lines name the repository, which may be another one than the run knew of.
    write_card(report, folder, repo_id=repo_id, model_license=model_license)
    write_eval_results(report, folder)
    url = push_folder(
        folder,
        repo_id,
        private=arguments.hub_private_repo,
        revision=revision,
        commit_message="Robust model",
        publish_images=arguments.publish_images,
        space=space,
    )
    show(f"pushed to {url}\n" + (f"its page is at {space_url(repo_id)}\n" if space else ""))


def _repair_on_hub(repo_id: str, arguments: argparse.Namespace) -> None:
    if arguments.hub_model_id not in (None, repo_id):
        raise ValueError(f"there is no folder {repo_id}; a repository is repaired in place, without --hub_model_id")
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise ValueError(f"--repair: {repo_id} is neither a folder, nor owner/name on the Hub")
    revision = arguments.hub_revision
    with TemporaryDirectory(prefix="ham_hf-repair-") as temporary:
        copy = Path(temporary)
        for name in REPAIR_READS:
            download_file(repo_id, name, copy, revision=revision, required="/" not in name)
        changes = repair_folder(copy)
        if changes:
            check_write_access(repo_id, private=False, revision=revision)
            message = "Repair config.json: loads with transformers"
            url = push_files(copy, repo_id, REPAIR_WRITES, revision=revision, commit_message=message)
    _print_changes(repo_id, changes)
    if changes:
        show(f"pushed to {url}\n")


def _print_changes(name: str, changes: Sequence[str]) -> None:
    lines = [f"{name}: {change}" for change in changes] or [f"{name} is in order: nothing was changed"]
    show("\n".join(lines) + "\n")
