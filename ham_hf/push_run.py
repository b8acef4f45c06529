"""One push from its command line: an existing folder to the Hub, or the repair of an older export."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ham_hf.artifacts import EVALUATION_NAME, LOADED_BY_TIMM, PAGE_NAME, REPORT_NAME
from ham_hf.faults import clean_exit
from ham_hf.hub import (
    PushError,
    check_target,
    check_write_access,
    download_file,
    push_evaluation,
    push_files,
    push_finished,
)
from ham_hf.hub_config import DEFAULT_REVISION, is_hub_id
from ham_hf.invocation import command
from ham_hf.models.export import REPAIR_READS, REPAIR_WRITES, repair_folder
from ham_hf.reporting.card import write_card
from ham_hf.reporting.eval_results import write_eval_results
from ham_hf.reporting.report import read_report
from ham_hf.terminal import show


def run_push(options: argparse.Namespace) -> None:
    """Push or repair what ``options`` name; status 2 if that cannot be or fails."""
    folder = options.folder
    with clean_exit(ValueError, OSError, PushError, RuntimeError):
        if not options.repair and options.hub_model_id is None:
            raise ValueError("--hub_model_id is missing: the repository to push to, owner/name")
        push, what, idle = _task(options)
        for flag in idle:
            if getattr(options, flag) not in (None, False, DEFAULT_REVISION):
                raise ValueError(f"--{flag} is not for {what}")
        if options.repair and folder.is_dir():
            _print_changes(str(folder), repair_folder(folder))
        if push is not None:
            push(folder, options)


def _task(options: argparse.Namespace) -> tuple[Callable[[Path, argparse.Namespace], None] | None, str, Sequence[str]]:
    """What to call, what it does, and the flags that have no effect on that."""
    folder, of_runs, of_pushes = options.folder, ["hub_space", "model_license"], ["hub_private_repo", "publish_images"]
    if options.repair and not folder.is_dir():
        return _repair_on_hub, "the repair of a repository on the Hub", [*of_runs, *of_pushes]
    if options.hub_model_id is None:
        return None, "a repair without --hub_model_id", [*of_runs, *of_pushes, "hub_revision", "create_pr"]
    if not (folder / EVALUATION_NAME).is_file():
        return _push, f"a folder without {EVALUATION_NAME}, which an evaluation writes", ["create_pr"]
    if options.create_pr:
        return _push_evaluation, "a pull request with an evaluation", [*of_runs, "hub_private_repo"]
    return _push_evaluation, "the folder of an evaluation", of_runs


def _push_evaluation(folder: Path, options: argparse.Namespace) -> None:
    repo_id, create_pr, revision = options.hub_model_id, options.create_pr, options.hub_revision
    repo_id = check_target(repo_id, create_pr=create_pr, private=options.hub_private_repo, revision=revision)
    images = options.publish_images
    url = push_evaluation(folder, repo_id, create_pr=create_pr, publish_images=images, revision=revision)
    show(f"pushed to {url}\n")


def _push(folder: Path, options: argparse.Namespace) -> None:
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
    if space and not (folder / PAGE_NAME).is_file():
        raise ValueError(f"--hub_space: {folder} has no {PAGE_NAME}; write it with {command('page')} {folder}")
    report = replace(report, config={**report.config, "hub_space": space})
    repo_id = check_write_access(
        options.hub_model_id, private=options.hub_private_repo, revision=revision, space=space
    )
    # The card's loading lines name the repository, which may differ from that of the run's settings.
    write_card(report, folder, repo_id=repo_id, model_license=model_license)
    write_eval_results(report, folder)
    push_finished(folder, repo_id, options)


def _repair_on_hub(folder: Path, options: argparse.Namespace) -> None:
    repo_id, wanted = str(folder), {"revision": options.hub_revision, "create_pr": options.create_pr}
    if options.hub_model_id not in (None, repo_id):
        raise ValueError(f"there is no folder {repo_id}; a repository is repaired in place, without --hub_model_id")
    if not is_hub_id(repo_id, with_owner=True):
        raise ValueError(f"--repair: {repo_id} is neither a folder, nor owner/name on the Hub")
    with TemporaryDirectory(prefix="ham_hf-repair-") as temporary:
        copy = Path(temporary)
        for name in REPAIR_READS:
            download_file(repo_id, name, copy, revision=options.hub_revision, required="/" not in name)
        changes = repair_folder(copy)
        if changes:
            check_target(repo_id, **wanted)
            message = "Repair config.json: loads with transformers"
            url = push_files(copy, repo_id, REPAIR_WRITES, commit_message=message, **wanted)
    _print_changes(repo_id, changes)
    if changes:
        show(f"pushed to {url}\n")


def _print_changes(name: str, changes: Sequence[str]) -> None:
    lines = [f"{name}: {change}" for change in changes] or [f"{name} is in order: nothing was changed"]
    show("\n".join(lines) + "\n")
