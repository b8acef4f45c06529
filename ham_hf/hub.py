"""Use the Hub: check write access before training, push a finished folder, limit how long a request may take.

A push reads files that are complete on disk and changes none. Repeating one is safe: the Hub skips files that it has.
Messages and logs never contain the token.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from ham_hf.artifacts import (
    CARD_NAME,
    EVAL_RESULTS,
    EVALUATION_NAME,
    LOADED_BY_TIMM,
    PAGE_NAME,
    PREDICTIONS_NAME,
    PUBLISHED_EVALUATION,
    PUBLISHED_RUN,
    REPORT_NAME,
)
from ham_hf.hub_config import DEFAULT_REVISION, HubConfig, target_problems
from ham_hf.hub_requests import (
    ACCESS_ERRORS,
    CONFLICTS,
    PUSH_ERRORS,
    RETRIED_STATUS,
    STRANGE_ANSWERS,
    AskedToWaitError,
    retry,
    status_of,
    without_token,
)
from ham_hf.invocation import command
from ham_hf.reporting.card import IMAGES, without_images as card_without_images
from ham_hf.reporting.page import SPACE_TAG, has_images, space_files, without_images
from ham_hf.reporting.report import read_report
from ham_hf.terminal import show

logger = logging.getLogger(__name__)

MAX_RESULT_BYTES = 200_000_000
"""Largest report or table of predictions that a comparison downloads from an unknown repository (our choice)."""


class PushError(RuntimeError):
    """A push failed for good; the message names the folder and the command that pushes it again."""


def check_write_access(
    repo_id: str | None, *, private: bool, revision: str = DEFAULT_REVISION, space: bool = False
) -> str:
    """Check before training that the finished model can be pushed; create the repository and branch if missing.

    ``private`` asks for a private repository, ``space`` for a Space of that name that is free or that this package
    wrote. The full "user/name" is returned, also for the "name" of one of the user's own.

    Raises:
        ValueError: if a push could not work; the message names the fix.
    """
    if not repo_id:
        raise ValueError("--push_to_hub needs --hub_model_id, the repository to push to, for example user/my-model")
    if not revision or revision.startswith("refs/"):
        raise ValueError(f"--hub_revision {revision!r}: expected the name of a branch, such as {DEFAULT_REVISION}")
    for problem in target_problems(repo_id):
        raise ValueError(problem)
    if get_token() is None:
        raise ValueError(
            "--push_to_hub needs a token with write access, and there is none: run `hf auth login`, set HF_TOKEN, or "
            "train without --push_to_hub"
        )
    api = HfApi()
    try:
        full_id = retry(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id)
        if private and not retry(lambda: api.model_info(full_id).private):
            raise ValueError(
                f"--hub_private_repo: {full_id} exists and is public. Make it private in its settings on the Hub, "
                "choose another --hub_model_id, or drop --hub_private_repo"
            )
        retry(lambda: _create_branch(api, full_id, revision))
        if space:
            _check_space(api, full_id)
    except ACCESS_ERRORS as error:
        raise ValueError(_access_problem(repo_id, revision, error)) from None
    return full_id


def _check_space(api: HfApi, repo_id: str) -> None:
    """Reject a Space of the model's name that serves another purpose, or that is public while the model is private."""
    try:
        found = retry(lambda: api.space_info(repo_id))
    except RepositoryNotFoundError:
        return
    tags = found.card_data.get("tags") if found.card_data else None
    # A push that failed before it filled a new Space left one with its first commit alone.
    if SPACE_TAG not in (tags or ()) and len(retry(lambda: api.list_repo_commits(repo_id, repo_type="space"))) > 1:
        raise ValueError(
            f"--hub_space: there is a Space {repo_id} that this package did not write. Rename it on the Hub, choose "
            "another --hub_model_id, or drop --hub_space"
        )
    if not found.private and retry(lambda: api.model_info(repo_id)).private:
        raise ValueError(
            f"--hub_space: the Space {repo_id} is public and the model is private. Make the Space private in its "
            "settings on the Hub, or drop --hub_space"
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = DEFAULT_REVISION,
    commit_message: str = "Upload model",
    attempts: int = 3,
    publish_images: bool = False,
    space: bool = False,
    model_license: str | None = None,
) -> str:
    """Push ``PUBLISHED_RUN`` from an output folder, which is not changed, to a branch of an existing repository.

    Args:
        folder: what to push.
        repo_id: "user/name".
        private: whether the command that an error names makes a private repository.
        revision: branch.
        commit_message: its first line.
        attempts: tries when the server or the connection fails, or another commit lands meanwhile.
        publish_images: push images of a dataset that is not known to be public; else ``report.html`` and the card go
            without them, and no figure of them is pushed.
        space: put the page into a static Space of the same name too, as private as the model.
        model_license: the license that the command that an error names asks for; None = as the folder has it.

    Returns:
        The URL of the commit, or of the last one if nothing has changed since.

    Raises:
        FileNotFoundError: if the folder lacks the model or its configuration; with ``space``, the page.
        PushError: if the push failed.
    """
    folder = Path(folder)
    _require(folder, (*LOADED_BY_TIMM, *((PAGE_NAME, REPORT_NAME) if space else ())), "a training run")
    withheld = _withheld(folder, publish_images=publish_images)
    files = _files(folder, PUBLISHED_RUN, withheld)
    upload = partial(_commit, repo_id, files, revision=revision, commit_message=commit_message)
    flags = {"hub_private_repo": private, "publish_images": publish_images, "hub_space": space}
    state = f"The folder {folder.resolve()} is complete and unchanged, and {repo_id} has what was pushed before."
    again = _push_again(folder, repo_id, {"hub_revision": revision, "model_license": model_license}, **flags)
    attempt = partial(_pushed, attempts=attempts, state=state, again=again)
    url = str(attempt(upload, f"{folder} to {repo_id}").commit_url)
    logger.info("Pushed %s to %s", folder, url)
    if space:
        page = withheld.get(PAGE_NAME) or (folder / PAGE_NAME).read_bytes()
        attempt(partial(_fill_space, page.decode(), folder, repo_id), f"{folder} to the Space {repo_id}")
        logger.info("Published %s at %s", PAGE_NAME, _space_url(repo_id))
    return url


def _files(folder: Path, names: Iterable[str], withheld: Mapping[str, bytes | None]) -> dict[str, bytes | Path]:
    """The files of a folder that match a name, those ``withheld`` left out or replaced."""
    found = sorted(path for name in names for path in folder.glob(name))
    files = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: withheld.get(name) or path for name, path in files.items() if withheld.get(name, b"") is not None}


def _commit(repo_id: str, files: Mapping[str, bytes | Path], **options: Any) -> CommitInfo:  # noqa: ANN401
    """Commit files, which a folder or memory holds; without changes the last commit is returned."""
    # Made anew for each try, as huggingface_hub marks in them the files that were uploaded.
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    with warnings.catch_warnings():
        # predictions.parquet belongs to the model.
        warnings.filterwarnings("ignore", message=".*commit a data file", category=UserWarning)
        commit: CommitInfo = HfApi().create_commit(repo_id, operations, **options)
    return commit


def _require(folder: Path, names: Iterable[str], kind: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: expected the output folder of {kind}")


def _push_again(folder: Path, repo_id: str, values: Mapping[str, str | None], **flags: bool) -> str:
    words = [*command("push").split(), str(folder), "--hub_model_id", repo_id]
    words += [f"--{flag}" for flag, given in flags.items() if given]
    for name, value in values.items():
        words += [] if value in (None, DEFAULT_REVISION) else [f"--{name}", str(value)]
    return f"Push it again with:\n    {shlex.join(words)}"


def push_finished(folder: Path, repo_id: str, options: HubConfig | argparse.Namespace) -> None:
    """`push_folder` with the settings of a push, whose URLs are shown on the terminal."""
    url = push_folder(
        folder,
        repo_id,
        private=options.hub_private_repo,
        revision=options.hub_revision,
        commit_message="Robust model",
        publish_images=options.publish_images,
        space=options.hub_space,
        model_license=options.model_license if isinstance(options, argparse.Namespace) else None,
    )
    show(f"pushed to {url}\n" + (f"its page is at {_space_url(repo_id)}\n" if options.hub_space else ""))


def _space_url(repo_id: str) -> str:
    return f"{constants.ENDPOINT}/spaces/{repo_id}"


def _fill_space(page: str, folder: Path, repo_id: str) -> CommitInfo:
    """Put ``page`` into the Space of the model's name; create the Space if missing."""
    api = HfApi()
    private = api.model_info(repo_id).private
    api.create_repo(repo_id, repo_type="space", space_sdk="static", private=private or None, exist_ok=True)
    _check_space(api, repo_id)
    files = space_files(page, read_report(folder), repo_id)
    return _commit(repo_id, files, repo_type="space", commit_message="Report of the model")


def _withheld(folder: Path, *, publish_images: bool) -> dict[str, bytes | None]:
    """Files that are pushed without images, or not at all, because the dataset is not known to be public.

    Returns:
        The page and the cards without images, by name, and None for images.
    """
    page = folder / PAGE_NAME
    shown = [name for name in IMAGES if (folder / name).is_file()]
    shown += [PAGE_NAME] if page.is_file() and has_images(page.read_text(encoding="utf-8")) else []
    if publish_images or not shown or _has_public_images(folder):
        return {}
    logger.warning(
        "images of the dataset (%s) are not pushed, as it is not known to be public; --publish_images pushes them",
        ", ".join(shown),
    )
    withheld: dict[str, bytes | None] = dict.fromkeys(IMAGES)
    for name in (PAGE_NAME, CARD_NAME, EVALUATION_NAME):
        text = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
        stripped = without_images(text) if name == PAGE_NAME else card_without_images(text)
        if stripped != text:
            withheld[name] = stripped.encode()
    return withheld


def _has_public_images(folder: Path) -> bool:
    """Whether the dataset of a run is public: the bundled digits, or an open dataset on the Hub."""
    try:
        dataset = read_report(folder).dataset
    except (OSError, ValueError):
        return False
    if dataset.hub_id is None:
        return dataset.name == "digits"
    try:
        # Without a token: as the public sees it.
        found = retry(partial(HfApi(token=False).dataset_info, dataset.hub_id))
    except ACCESS_ERRORS:
        return False
    return not (found.private or found.gated)


def try_push(
    folder: str | Path, repo_id: str, *, revision: str = DEFAULT_REVISION, commit_message: str = "Upload model"
) -> bool:
    """Push once during a run. On failure only warn, as the next save pushes again. True if it worked."""
    try:
        push_folder(folder, repo_id, revision=revision, commit_message=commit_message, attempts=1)
    except PushError as error:
        reason = str(error).partition("\n")[0]  # the other lines are about a finished folder
        logger.warning("Training continues, the next save pushes again: %s", reason)
        return False
    return True


def download_file(
    repo_id: str, name: str, folder: Path, *, revision: str = DEFAULT_REVISION, required: bool = True
) -> None:
    """Download the file ``name`` of a model to the same place in a folder; ValueError if a ``required`` one fails."""
    try:
        retry(lambda: hf_hub_download(repo_id, name, revision=revision, local_dir=folder))
    except PUSH_ERRORS as error:
        if required or not isinstance(error, EntryNotFoundError):
            raise _not_downloaded(f"{name} of {repo_id} (revision {revision})", error) from None


def _not_downloaded(what: str, error: Exception) -> ValueError:
    return ValueError(
        f"could not get {what} from the Hub; expected OWNER/NAME of a model that this package pushed "
        f"({without_token(error)})"
    )


def push_files(
    folder: Path, repo_id: str, names: Sequence[str], *, revision: str, create_pr: bool, commit_message: str
) -> str:
    """Push some files of a folder as one commit or pull request, whose URL is returned; other files stay."""
    options = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
    upload = partial(_commit, repo_id, _files(folder, names, {}), **options)
    attempts, state = 1 if create_pr else 3, f"{repo_id} is as it was."
    commit = _pushed(upload, f"to {repo_id}", attempts=attempts, state=state, again="Run the same command again")
    return str(commit.pr_url or commit.commit_url)


def check_pull_request(repo_id: str) -> None:
    """Check before an evaluation that its pull request can be opened; changes nothing on the Hub.

    Raises:
        ValueError: if there is no token that the Hub accepts, or no such repository; the message names the fix.
    """
    if get_token() is None:
        raise ValueError(
            "--create_pr needs a token, and there is none: run `hf auth login`, set HF_TOKEN, or evaluate without "
            "--push_to_hub"
        )
    try:
        retry(lambda: HfApi().whoami())
        retry(lambda: HfApi().model_info(repo_id))
    except ACCESS_ERRORS as error:
        missing = f"--create_pr: there is no model {repo_id} on the Hub, or the token may not read it"
        problem = missing if status_of(error) == 404 else _access_problem(repo_id, DEFAULT_REVISION, error)
        raise ValueError(problem) from None


def check_target(
    repo_id: str | None, *, create_pr: bool, private: bool = False, revision: str = DEFAULT_REVISION
) -> str:
    """`check_pull_request` or `check_write_access`; returns the full id."""
    if not create_pr:
        return check_write_access(repo_id, private=private, revision=revision)
    check_pull_request(str(repo_id))
    return str(repo_id)


def push_evaluation(
    folder: str | Path,
    repo_id: str,
    *,
    create_pr: bool,
    publish_images: bool = False,
    revision: str = DEFAULT_REVISION,
) -> str:
    """Push ``PUBLISHED_EVALUATION`` from a folder to a model's repository, as one commit or one pull request.

    A repository with the ``report.json`` of more than an evaluation keeps it and its figures; the files then go into
    its folder ``evaluation``. Images follow the rule of `push_folder`. A pull request is tried once, as one whose
    answer got lost may be open already.

    Returns:
        The URL of the pull request or commit.

    Raises:
        FileNotFoundError: if the folder holds no evaluation.
        PushError: if the push failed.
    """
    folder = Path(folder)
    _require(folder, (REPORT_NAME, EVALUATION_NAME), "an evaluation")
    files = _files(folder, PUBLISHED_EVALUATION, _withheld(folder, publish_images=publish_images))

    def upload() -> CommitInfo:
        place = "evaluation/" if _keeps_its_report(repo_id, revision) else ""
        placed = {name if name.startswith(EVAL_RESULTS) else place + name: data for name, data in files.items()}
        message = "Robustness per class, measured by ham_hf"
        return _commit(repo_id, placed, commit_message=message, create_pr=create_pr, revision=revision)

    flags = {"create_pr": create_pr, "publish_images": publish_images}
    again = _push_again(folder, repo_id, {"hub_revision": revision}, **flags)
    attempts, state = 1 if create_pr else 3, f"It is complete in {folder.resolve()}."
    commit = _pushed(upload, f"the evaluation to {repo_id}", attempts=attempts, state=state, again=again)
    return str(commit.pr_url or commit.commit_url)


def _keeps_its_report(repo_id: str, revision: str) -> bool:
    """Whether a repository has a ``report.json`` that is not of an evaluation alone."""
    try:
        report = read_report(hf_hub_download(repo_id, REPORT_NAME, revision=revision))
    except EntryNotFoundError:
        return False
    except ValueError:  # not a report of this package
        return True
    return report.training is not None or report.calibration is not None


class SavePushes:
    """Push the saves of a run one at a time, each on a daemon thread, which a run that stops does not wait for.

    Each time a push is waited for ``patience`` seconds at most: the other processes of a run wait for this one at the
    next update, and give up after ``--ddp_timeout``.
    """

    def __init__(self, folder: str | Path, repo_id: str, *, revision: str, patience: float) -> None:
        self.folder, self.repo_id, self.revision, self.patience = folder, repo_id, revision, patience
        self._last: threading.Thread | None = None

    def push(self, export: Callable[[], object], *, commit_message: str) -> None:
        """Push what ``export`` writes into the folder; while an earlier push is running, write and push nothing."""
        if not self.wait(self.patience):
            logger.warning("an earlier push is still under way: the next save pushes again")
            return
        export()
        push = partial(try_push, self.folder, self.repo_id, revision=self.revision, commit_message=commit_message)
        self._last = threading.Thread(target=push, daemon=True)
        self._last.start()
        self.wait(self.patience)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the last push to end, at most ``seconds`` (None: no limit); True if it has ended."""
        if self._last is not None:
            self._last.join(seconds)
        return self._last is None or not self._last.is_alive()


def download_results(repo_id: str, revision: str | None = None) -> Path:
    """Download ``report.json`` and ``predictions.parquet``, if there is one, of a model on the Hub, from one commit.

    Their folder in the Hub's cache is returned. In offline mode they come from there.

    Raises:
        ValueError: if the download fails, or a file has more than ``MAX_RESULT_BYTES``.
    """
    names, commit = [REPORT_NAME], revision
    try:
        if not constants.HF_HUB_OFFLINE:
            found = retry(lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True))
            sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
            names, commit = [REPORT_NAME, *({PREDICTIONS_NAME} & {*sizes})], found.sha
            for name in names:
                if sizes.get(name, 0) > MAX_RESULT_BYTES:
                    raise ValueError(f"{name} has {sizes[name]:,} bytes, more than {MAX_RESULT_BYTES:,}")
        paths = [retry(partial(hf_hub_download, repo_id, name, revision=commit)) for name in names]
    except PUSH_ERRORS as error:
        raise _not_downloaded(f"{REPORT_NAME} of {repo_id}", error) from None
    return Path(paths[0]).parent


def _create_branch(api: HfApi, repo_id: str, branch: str) -> None:
    # Not with exist_ok, which hides that the token may not write.
    try:
        api.create_branch(repo_id, branch=branch)
    except HfHubHTTPError as error:
        if status_of(error) != 409:
            raise


def _pushed(upload: Callable[[], CommitInfo], what: str, *, attempts: int, state: str, again: str) -> CommitInfo:
    """The commit of ``upload``, or PushError: ``what`` failed, what to fix if that is known, and how to push again."""
    try:
        return retry(upload, attempts, also=CONFLICTS)
    except PUSH_ERRORS as error:
        advice = {
            401: "The token is not accepted: run `hf auth login` or renew HF_TOKEN first. ",
            403: "The token may not write there: get the rights, or take another --hub_model_id. ",
            404: "The repository or branch is gone: the command below creates it again. ",
        }.get(status_of(error) or 0, "")
        raise PushError(f"pushing {what} failed: {without_token(error)}\n{state} {advice}{again}") from None


def _access_problem(repo_id: str, revision: str, error: Exception) -> str:
    """Explain an error of a request before training, and how to fix it."""
    push, hub, status = "--push_to_hub:", constants.ENDPOINT, status_of(error)
    without = f"train without --push_to_hub and push the folder later with {command('push')}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{push} HF_HUB_OFFLINE is set. Unset it, or {without}"
    if isinstance(error, STRANGE_ANSWERS):
        problem = (
            f"{push} {hub} gave an answer that is not of a Hub. Check HF_ENDPOINT and whether "
            f"the network wants a login, or {without}"
        )
    elif isinstance(error, AskedToWaitError):
        problem = f"{push} {hub} is busy. Try again then, or {without}"
    elif status is None:
        problem = f"{push} cannot reach {hub}. Check the connection, or {without}"
    elif status == 401:
        problem = f"{push} the Hub does not accept the token. Run `hf auth login` or renew HF_TOKEN"
    elif status in (402, 403, 404):
        advice = "Use a token that may, or another --hub_model_id"
        problem = f"--hub_model_id {repo_id}: the token may not write there. {advice}"
    elif status in RETRIED_STATUS:
        problem = f"{push} {hub} is not working. Try again later, or {without}"
    else:
        problem = f"--hub_model_id {repo_id}, --hub_revision {revision}: the Hub refused"
    return f"{problem}. ({without_token(error)})"
