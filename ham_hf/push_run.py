"""One push from its command line: an existing folder to the Hub, or the repair of an older export."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ham_hf.artifacts import EVALUATION_NAME, LOADED_BY_TIMM, PAGE_NAME, REPORT_NAME
from ham_hf.faults import clean_exit
from ham_hf.hub import (
    PushError,
    check_pull_request,
    check_write_access,
    download_file,
    push_evaluation,
    push_files,
    push_finished,
)
from ham_hf.hub_config import is_hub_id
from ham_hf.invocation import command
from ham_hf.models.export import REPAIR_READS, REPAIR_WRITES, repair_folder
from ham_hf.reporting.card import write_card
from ham_hf.reporting.eval_results import write_eval_results
from ham_hf.reporting.report import read_report
from ham_hf.terminal import show


def run_push(options: argparse.Namespace) -> None:
    """Push or repair what ``options`` name; status 2 if that cannot be or fails."""
    folder, repo_id = options.folder, options.hub_model_id
    with clean_exit(ValueError, OSError, PushError, RuntimeError):
        if not options.repair and repo_id is None:
            raise ValueError("--hub_model_id is missing: the repository to push to, owner/name")
        if options.repair and not folder.is_dir():
            _repair_on_hub(str(folder), options)
            return
        if options.repair:
            _print_changes(str(folder), repair_folder(folder))
        if repo_id is not None and (folder / EVALUATION_NAME).is_file():
            _push_evaluation(folder, options)
        elif repo_id is not None:
            _push(folder, options)


def _push_evaluation(folder: Path, options: argparse.Namespace) -> None:
    repo_id, create_pr, revision = options.hub_model_id, options.create_pr, options.hub_revision
    if create_pr:
        check_pull_request(repo_id)
    else:
        repo_id = check_write_access(repo_id, private=options.hub_private_repo, revision=revision)
    url = push_evaluation(
        folder, repo_id, create_pr=create_pr, publish_images=options.publish_images, revision=revision
    )
    show(f"pushed to {url}\n")


def _push(folder: Path, options: argparse.Namespace) -> None:
    if options.create_pr:
        raise ValueError(f"--create_pr is for the folder of an evaluation, and {folder} has no {EVALUATION_NAME}")
    missing = [name for name in (*LOADED_BY_TIMM, REPORT_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is not the folder of a finished run: {', '.join(missing)} missing")
    report = read_report(folder / REPORT_NAME)
    model_license = options.model_license or report.config.get("model_license")
    made_here = report.training is not None or report.calibration is not None
    if not made_here or not isinstance(model_license, str):
        raise ValueError(
            f"{folder} holds no training: its {REPORT_NAME} lacks "
            + ("the license; name it with --model_license" if made_here else "a training section")
        )
    revision, space = options.hub_revision, options.hub_space
    if space:
        if not (folder / PAGE_NAME).is_file():
            raise ValueError(f"--hub_space: {folder} has no {PAGE_NAME}; write it with {command('page')} {folder}")
        report = replace(report, config={**report.config, "hub_space": True})
    repo_id = check_write_access(
        options.hub_model_id, private=options.hub_private_repo, revision=revision, space=space
    )
    # The card's loading lines name the repository, which may differ from that of the run's settings.
    write_card(report, folder, repo_id=repo_id, model_license=model_license)
    write_eval_results(report, folder)
    push_finished(folder, repo_id, options)


def _repair_on_hub(repo_id: str, options: argparse.Namespace) -> None:
    if options.hub_model_id not in (None, repo_id):
        raise ValueError(f"there is no folder {repo_id}; a repository is repaired in place, without --hub_model_id")
    if not is_hub_id(repo_id, with_owner=True):
        raise ValueError(f"--repair: {repo_id} is neither a folder, nor owner/name on the Hub")
    revision = options.hub_revision
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
