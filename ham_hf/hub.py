"""The only module that writes to the Hub: write access before training, pushes of a finished folder.

Invariant 9: everything is complete on disk before the first byte goes out. A push reads the folder and changes
nothing in it, and pushing again is safe: files that the Hub has already are not sent again, so a failed push loses
nothing. Nothing waits forever (`ham_hf.hub_waiting`). Messages and logs never contain the token.
"""

from __future__ import annotations

import logging
import re
import shlex
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ham_hf.hub_waiting import WAIT_LIMIT, AskedToWaitError, asked_wait, limit_waiting
from ham_hf.reporting.report import REPORT_NAME

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_REVISION = "main"
ARTEFACTS = (
    "model.safetensors",
    "config.json",
    "README.md",
    "report.json",
    "predictions.parquet",
    "train_config.yaml",
    "metrics.jsonl",
    "figures/*.png",
    "rgb/config.json",
    "rgb/model.safetensors",
)
"""What is published of an output folder. Checkpoints, which hold optimizer state as pickles, are not."""

REQUIRED = ("model.safetensors", "config.json")
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
CONFLICTS = (409, 412)
"""Somebody else's commit landed in between, or is landing; a push reads the new state and goes on top of it."""

# huggingface_hub changed its HTTP client twice (requests, httpx, httpx2), and only some of their errors are OSErrors.
# Its own error derives from the base class of whichever client it uses.
NETWORK_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
STRANGE_ANSWERS = (LookupError, TypeError, AttributeError, JSONDecodeError)
"""What huggingface_hub raises on an answer that is not the Hub's: a login page of the network, say."""
ACCESS_ERRORS: tuple[type[Exception], ...] = (*NETWORK_ERRORS, *STRANGE_ANSWERS)
# RuntimeError: the transfer library (hf_xet); ValueError: metadata in README.md that the Hub refuses.
PUSH_ERRORS: tuple[type[Exception], ...] = (*ACCESS_ERRORS, RuntimeError, ValueError)


class PushError(RuntimeError):
    """A push that failed for good; the message names the folder and the command that pushes it again."""


def check_write_access(repo_id: str | None, *, private: bool, revision: str = DEFAULT_REVISION) -> str:
    """Make sure, before training, that the finished model can be pushed: repository, branch and rights.

    The repository and the branch are created if they do not exist.

    Args:
        repo_id: "user/name", or "name" for one of the user's own.
        private: True if the repository must be private.
        revision: branch to push to.

    Returns:
        The full "user/name".

    Raises:
        ValueError: with the way out, if a push could not work.
    """
    if not repo_id:
        raise ValueError("--push_to_hub needs --hub_model_id, the repository to push to, for example user/my-model")
    if not revision or revision.startswith("refs/"):
        raise ValueError(f"--hub_revision {revision!r}: expected the name of a branch, such as {DEFAULT_REVISION}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id {repo_id}: expected user/name or name. {error}") from error
    if get_token() is None:
        raise ValueError(
            "--push_to_hub needs a token with write access, and there is none: run `hf auth login`, set HF_TOKEN, or "
            "train without --push_to_hub"
        )
    limit_waiting()
    api = HfApi()
    try:
        full_id = _retry(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id, attempts=3)
        if private and not _retry(lambda: api.model_info(full_id).private, attempts=3):
            raise ValueError(
                f"--hub_private_repo: {full_id} exists and is public. Make it private in its settings on the Hub, "
                "choose another --hub_model_id, or drop --hub_private_repo"
            )
        _retry(lambda: _create_branch(api, full_id, revision), attempts=3)
    except ACCESS_ERRORS as error:
        raise ValueError(_access_problem(repo_id, revision, error)) from None
    return full_id


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = DEFAULT_REVISION,
    commit_message: str = "Upload model",
    attempts: int = 3,
) -> str:
    """Push the artefacts of an output folder; the repository exists already (``check_write_access``).

    Args:
        folder: output folder; only ``ARTEFACTS`` of it are sent.
        repo_id: "user/name".
        private: True if the repository must be private, for the command that a failed push names.
        revision: branch to push to.
        commit_message: first line of the commit.
        attempts: how often to try when the server or the connection fails, or another commit gets in between; the
            wait doubles from 1 second, or is what the server asks for.

    Returns:
        The URL of the commit (of the last one, if nothing has changed since).

    Raises:
        FileNotFoundError: if the folder lacks the model or its configuration.
        PushError: if the push failed.
    """
    for name in REQUIRED:
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: expected the output folder of a training run")

    limit_waiting()

    def upload() -> str:
        with warnings.catch_warnings():
            # predictions.parquet belongs to the model.
            warnings.filterwarnings("ignore", message=".*commit a data file", category=UserWarning)
            commit = HfApi().upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                allow_patterns=list(ARTEFACTS),
            )
        return str(commit.commit_url)

    try:
        url = _retry(upload, attempts=attempts, also=CONFLICTS)
    except PUSH_ERRORS as error:
        command = ["python", "recipes/push.py", str(folder), "--hub_model_id", repo_id]
        if private:
            command.append("--hub_private_repo")
        if revision != DEFAULT_REVISION:
            command += ["--hub_revision", revision]
        raise PushError(
            f"pushing {folder} to {repo_id} failed: {_without_token(error)}\nThe folder {Path(folder).resolve()} is "
            f"complete and unchanged, and {repo_id} has what was pushed before. {_way_out(error)}Push it again "
            f"with:\n    {shlex.join(command)}"
        ) from None
    logger.info("Pushed %s to %s", folder, url)
    return url


def try_push(
    folder: str | Path, repo_id: str, *, revision: str = DEFAULT_REVISION, commit_message: str = "Upload model"
) -> bool:
    """Push in the middle of a run: one attempt, and a failure is a warning, as the next save pushes again.

    Returns:
        True if the push went through.
    """
    try:
        push_folder(folder, repo_id, revision=revision, commit_message=commit_message, attempts=1)
    except PushError as error:
        # The rest of the message is about a finished folder.
        reason = str(error).partition("\n")[0]
        logger.warning("Training goes on, the next save pushes again: %s", reason)
        return False
    return True


def download_files(repo_id: str, names: Sequence[str], folder: Path, *, revision: str = DEFAULT_REVISION) -> None:
    """Fetch files of a model on the Hub into a folder, to change them there.

    Raises:
        ValueError: if one does not exist, or cannot be had.
    """
    limit_waiting()
    try:
        for name in names:
            _retry(partial(hf_hub_download, repo_id, name, revision=revision, local_dir=folder), attempts=3)
    except PUSH_ERRORS as error:
        raise ValueError(
            f"could not get {' and '.join(names)} of {repo_id} (revision {revision}) from the Hub; expected "
            f"OWNER/NAME of a model that this package pushed ({_without_token(error)})"
        ) from None


def push_files(folder: Path, repo_id: str, names: Sequence[str], *, revision: str, commit_message: str) -> str:
    """Push some files of a folder as one commit; the others of the repository stay.

    Returns:
        The URL of the commit.

    Raises:
        PushError: if the push failed.
    """
    limit_waiting()
    upload = partial(
        HfApi().upload_folder,
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        allow_patterns=list(names),
    )
    try:
        return str(_retry(upload, attempts=3, also=CONFLICTS).commit_url)
    except PUSH_ERRORS as error:
        raise PushError(
            f"pushing to {repo_id} failed: {_without_token(error)}\n{repo_id} is as it was. {_way_out(error)}Give the "
            "same command again"
        ) from None


def download_report(repo_id: str, revision: str | None = None) -> Path:
    """Fetch the ``report.json`` of a model on the Hub into the Hub's cache, unless it is there already.

    Args:
        repo_id: "user/name".
        revision: branch, tag or commit; None for the main branch.

    Returns:
        The path of the file.

    Raises:
        ValueError: if there is none, or it cannot be had.
    """
    limit_waiting()
    try:
        return Path(_retry(lambda: hf_hub_download(repo_id, REPORT_NAME, revision=revision), attempts=3))
    except PUSH_ERRORS as error:
        raise ValueError(
            f"could not get {REPORT_NAME} of {repo_id} from the Hub; expected OWNER/NAME of a model that this package "
            f"pushed ({_without_token(error)})"
        ) from None


def _create_branch(api: HfApi, repo_id: str, branch: str) -> None:
    """Create ``branch`` unless it exists. The Hub asks for write access first: 403 without it, 409 if it exists."""
    try:
        api.create_branch(repo_id, branch=branch)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise


def _retry(action: Callable[[], T], *, attempts: int, also: Collection[int] = ()) -> T:
    """Call ``action`` until it works, waiting 1, 2, 4 ... seconds after a failure that may pass.

    Where the server says how long to wait, that is how long. A status in ``also`` may pass too.
    """
    for attempt in range(1, attempts):
        try:
            return action()
        except NETWORK_ERRORS as error:  # noqa: PERF203 (trying again is the point)
            if not _may_pass(error, also):
                raise
            asked = asked_wait(error.response.headers) if isinstance(error, HfHubHTTPError) else None
            wait = min(max(2 ** (attempt - 1), asked or 0), WAIT_LIMIT)
            logger.warning("The Hub did not do it (%s); trying again in %d s", _without_token(error), wait)
            time.sleep(wait)
    return action()


def _may_pass(error: Exception, also: Collection[int]) -> bool:
    """True for a busy server and for a lost connection, False for a refusal and for a file that cannot be read."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (*RETRIED_STATUS, *also)
    if isinstance(error, (OfflineModeIsEnabled, AskedToWaitError)):
        return False
    # The built-in OSErrors apart from these two are about local files.
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__ != "builtins"


def _way_out(error: Exception) -> str:
    """What has to change before pushing again helps, if there is something; ends with a space."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    return {
        401: "The token is not accepted: run `hf auth login` or renew HF_TOKEN first. ",
        403: "The token may not write there: get the rights, or take another --hub_model_id. ",
        404: "There is no such repository or branch now: the command below makes it again. ",
    }.get(status or 0, "")


def _access_problem(repo_id: str, revision: str, error: Exception) -> str:
    """What to do about ``error`` of a request before training."""
    detail = _without_token(error)
    without = "train without --push_to_hub and push the folder later with recipes/push.py"
    if isinstance(error, OfflineModeIsEnabled):
        return f"--push_to_hub: HF_HUB_OFFLINE is set. Unset it, or {without}"
    if isinstance(error, STRANGE_ANSWERS):
        return (
            f"--push_to_hub: {constants.ENDPOINT} gave an answer that is not of a Hub. Check HF_ENDPOINT and whether "
            f"the network wants a login, or {without}. ({detail})"
        )
    if isinstance(error, AskedToWaitError):
        return f"--push_to_hub: {constants.ENDPOINT} is busy. Try again then, or {without}. ({detail})"
    if not isinstance(error, HfHubHTTPError):
        return f"--push_to_hub: cannot reach {constants.ENDPOINT}. Check the connection, or {without}. ({detail})"
    status = error.response.status_code
    if status == 401:
        return f"--push_to_hub: the Hub does not accept the token. Run `hf auth login` or renew HF_TOKEN. ({detail})"
    if status in (402, 403, 404):
        return (
            f"--hub_model_id {repo_id}: the token may not write there. Use a token that may, or another "
            f"--hub_model_id. ({detail})"
        )
    if status in RETRIED_STATUS:
        return f"--push_to_hub: {constants.ENDPOINT} is not working. Try again later, or {without}. ({detail})"
    return f"--hub_model_id {repo_id}, --hub_revision {revision}: the Hub refused. ({detail})"


def _without_token(error: Exception) -> str:
    """The text of ``error`` without anything that is, or looks like, an access token."""
    message = f"{type(error).__name__}: {error}"
    token = get_token()
    if token:
        message = message.replace(token, "***")
    return re.sub(r"\bhf_\w{8,}", "hf_***", message)
