"""The Hub: check write access before training, push a finished folder, limit how long a request may take.

Everything is complete on disk before the first byte is sent. A push only reads the folder, and repeating one is safe:
the Hub skips files that it already has, so a failed push loses nothing. Messages and logs never contain the token.

huggingface_hub retries a failed request up to five times, 1, 2, 4, 8 and 8 seconds apart. By default its client waits
forever for an answer, and sleeps through any ``Retry-After``, even a day. `limit_waiting` bounds both (the values are
our choice), so a single request takes at most six time-outs and 23 seconds.
"""

from __future__ import annotations

import logging
import re
import shlex
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_session,
    get_token,
    hf_hub_download,
    set_client_factory,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id  # type: ignore[attr-defined]

from ham_hf.evaluation.verdicts import PREDICTIONS_NAME
from ham_hf.invocation import command
from ham_hf.reporting.card import IMAGES
from ham_hf.reporting.card import without_images as card_without_images
from ham_hf.reporting.eval_results import EVAL_RESULTS
from ham_hf.reporting.page import PAGE_NAME, SPACE_TAG, has_images, space_files, without_images
from ham_hf.reporting.report import REPORT_NAME, read_report

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_REVISION = "main"
REQUIRED = ("model.safetensors", "config.json")
CARD_NAME = "README.md"
ARTEFACTS = (
    *REQUIRED,
    CARD_NAME,
    "report.json",
    "predictions.parquet",
    "report.html",
    "train_config.yaml",
    "metrics.jsonl",
    "figures/*.png",
    "image.png",
    ".eval_results/*.yaml",
    "rgb/config.json",
    "rgb/model.safetensors",
)
"""The files of an output folder that are published. Checkpoints, which hold optimizer state as pickles, are not."""
EVALUATION_NAME = "EVALUATION.md"
EVALUATED = (REPORT_NAME, EVALUATION_NAME, "figures/*.png", ".eval_results/*.yaml")
"""Likewise of the folder of an evaluation."""

RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
CONFLICTS = (409, 412)
"""Another commit got in between. A repeated push reads the new state and commits on top of it."""

SILENCE_LIMIT = 60.0
"""Seconds within which a server must send or take at least one byte; a request with its own limit keeps that."""
WAIT_LIMIT = 60
"""Longest wait in seconds that a server may ask for."""
MAX_RESULT_BYTES = 200_000_000
"""Largest report or table of predictions that is fetched to be compared (our choice): a stranger may name any."""

# huggingface_hub uses httpx or httpx2, depending on the version; its error derives from the base class of either.
NETWORK_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
STRANGE_ANSWERS = (LookupError, TypeError, AttributeError, JSONDecodeError)
"""What huggingface_hub raises when something else than a Hub answers, for example the login page of a network."""
ACCESS_ERRORS: tuple[type[Exception], ...] = (*NETWORK_ERRORS, *STRANGE_ANSWERS)
# RuntimeError: the transfer library (hf_xet); ValueError: metadata in README.md that the Hub refuses.
PUSH_ERRORS: tuple[type[Exception], ...] = (*ACCESS_ERRORS, RuntimeError, ValueError)


class PushError(RuntimeError):
    """A push failed for good; the message names the folder and the command that pushes it again."""


class AskedToWaitError(OSError):
    """The Hub asks for a longer wait than ``WAIT_LIMIT``."""


def check_write_access(
    repo_id: str | None, *, private: bool, revision: str = DEFAULT_REVISION, space: bool = False
) -> str:
    """Check before training that the finished model can be pushed; create the repository and branch if missing.

    ``repo_id`` is "user/name", or "name" for one of the user's own. With ``space``, a Space of that name has to be
    free, or one that this package wrote. Returns the full "user/name".

    Raises:
        ValueError: saying what to fix, if a push could not work.
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
        full_id = _retry(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id)
        if private and not _retry(lambda: api.model_info(full_id).private):
            raise ValueError(
                f"--hub_private_repo: {full_id} exists and is public. Make it private in its settings on the Hub, "
                "choose another --hub_model_id, or drop --hub_private_repo"
            )
        _retry(lambda: _create_branch(api, full_id, revision))
        if space:
            _check_space(api, full_id)
    except ACCESS_ERRORS as error:
        raise ValueError(_access_problem(repo_id, revision, error)) from None
    return full_id


def _check_space(api: HfApi, repo_id: str) -> None:
    """Reject a Space of the model's name that serves another purpose, or that is public while the model is private.

    Raises:
        ValueError: saying what to do.
    """
    try:
        found = _retry(lambda: api.space_info(repo_id))
    except RepositoryNotFoundError:
        return
    tags = found.card_data.get("tags") if found.card_data else None
    # One that a push made and did not get to fill has its first commit alone.
    if SPACE_TAG not in (tags or ()) and len(_retry(lambda: api.list_repo_commits(repo_id, repo_type="space"))) > 1:
        raise ValueError(
            f"--hub_space: there is a Space {repo_id} that this package did not write. Rename it on the Hub, choose "
            "another --hub_model_id, or drop --hub_space"
        )
    if not found.private and _retry(lambda: api.model_info(repo_id)).private:
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
) -> str:
    """Push the ``ARTEFACTS`` of an output folder to branch ``revision`` of an existing repository "user/name".

    Makes up to ``attempts`` tries when the server or the connection fails, or another commit gets in between.
    Of a dataset that is not public, no images are pushed, unless ``publish_images``: none in ``report.html`` and the
    card, and no figure of them; those in the folder keep them. With ``space``, the page goes into a static Space of
    the same name after that, as private as the model is. ``private`` only goes into the command that a failed push
    names. Returns the URL of the commit, or of the last one if nothing has changed since.

    Raises:
        FileNotFoundError: if the folder lacks the model or its configuration; with ``space``, the page.
        PushError: if the push failed.
    """
    folder = Path(folder)
    for name in (*REQUIRED, *((PAGE_NAME, REPORT_NAME) if space else ())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: expected the output folder of a training run")
    limit_waiting()
    withheld = not publish_images and _withholds_images(folder)
    replaced = _without_images(folder) if withheld else {}

    def upload() -> Any:  # noqa: ANN401 (the client's CommitInfo)
        if replaced:
            HfApi().create_commit(
                repo_id,
                [CommitOperationAdd(name, data) for name, data in replaced.items()],
                revision=revision,
                commit_message=f"{commit_message}: {', '.join(replaced)}",
            )
        with warnings.catch_warnings():
            # predictions.parquet belongs to the model.
            warnings.filterwarnings("ignore", message=".*commit a data file", category=UserWarning)
            return HfApi().upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                allow_patterns=[name for name in ARTEFACTS if name not in replaced],
                ignore_patterns=list(IMAGES) if withheld else None,
            )

    place = repo_id
    try:
        commit = _retry(upload, attempts, also=CONFLICTS)
        logger.info("Pushed %s to %s", folder, commit.commit_url)
        if space:
            place = f"the Space {repo_id}"
            _push_space(folder, repo_id, page=replaced.get(PAGE_NAME), attempts=attempts)
    except PUSH_ERRORS as error:
        again = _push_command(
            folder, repo_id, revision, hub_private_repo=private, publish_images=publish_images, hub_space=space
        )
        raise PushError(
            f"pushing {folder} to {place} failed: {_without_token(error)}\nThe folder {folder.resolve()} is "
            f"complete and unchanged, and {repo_id} has what was pushed before. {_advice(error)}Push it again "
            f"with:\n    {again}"
        ) from None
    return str(commit.commit_url)


def _push_command(folder: Path, repo_id: str, revision: str, **flags: bool) -> str:
    words = [*command("push").split(), str(folder), "--hub_model_id", repo_id]
    words += [f"--{flag}" for flag, given in flags.items() if given]
    return shlex.join([*words, *(["--hub_revision", revision] if revision != DEFAULT_REVISION else [])])


def space_url(repo_id: str) -> str:
    """Where the page of a pushed model is."""
    return f"{constants.ENDPOINT}/spaces/{repo_id}"


def _push_space(folder: Path, repo_id: str, *, page: bytes | None, attempts: int) -> None:
    """The page of a folder, or ``page`` in its place, into the Space of the model's name, made if it is missing."""
    api = HfApi()
    html = (page or (folder / PAGE_NAME).read_bytes()).decode()
    operations = [
        CommitOperationAdd(name, data) for name, data in space_files(html, read_report(folder), repo_id).items()
    ]

    def upload() -> None:
        private = api.model_info(repo_id).private
        api.create_repo(repo_id, repo_type="space", space_sdk="static", private=private or None, exist_ok=True)
        _check_space(api, repo_id)
        api.create_commit(repo_id, operations, repo_type="space", commit_message="Report of the model")

    _retry(upload, attempts, also=CONFLICTS)
    logger.info("Published %s at %s", PAGE_NAME, space_url(repo_id))


def _without_images(folder: Path) -> dict[str, bytes]:
    """Page and card of a folder without images of the dataset, as far as they show any, by name."""
    replaced = {}
    for name, strip in (
        (PAGE_NAME, without_images),
        (CARD_NAME, card_without_images),
        (EVALUATION_NAME, card_without_images),
    ):
        text = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
        if strip(text) != text:
            replaced[name] = strip(text).encode()
    return replaced


def _withholds_images(folder: Path) -> bool:
    """Return whether a folder's images must stay local: it shows some, and the dataset is not known to be public."""
    page = folder / PAGE_NAME
    shown = [name for name in IMAGES if (folder / name).is_file()]
    shown += [PAGE_NAME] if page.is_file() and has_images(page.read_text(encoding="utf-8")) else []
    if not shown or _has_public_images(folder):
        return False
    logger.warning(
        "images of the dataset (%s) are not pushed, as it is not known to be public; --publish_images pushes them",
        ", ".join(shown),
    )
    return True


def _has_public_images(folder: Path) -> bool:
    """Return whether the dataset of a run is public: the bundled digits, or an open dataset on the Hub."""
    try:
        dataset = read_report(folder).dataset
    except (OSError, ValueError):
        return False
    if dataset.hub_id is None:
        return dataset.name == "digits"
    hub_id = dataset.hub_id
    try:
        # Without a token: what somebody sees who is not logged in.
        found = _retry(lambda: HfApi(token=False).dataset_info(hub_id))
    except ACCESS_ERRORS:
        return False
    return not (found.private or found.gated)


def try_push(
    folder: str | Path, repo_id: str, *, revision: str = DEFAULT_REVISION, commit_message: str = "Upload model"
) -> bool:
    """Push once in the middle of a run; on failure only warn, as the next save pushes again. True if it worked."""
    try:
        push_folder(folder, repo_id, revision=revision, commit_message=commit_message, attempts=1)
    except PushError as error:
        reason = str(error).partition("\n")[0]  # the other lines are about a finished folder
        logger.warning("Training goes on, the next save pushes again: %s", reason)
        return False
    return True


def download_file(
    repo_id: str, name: str, folder: Path, *, revision: str = DEFAULT_REVISION, required: bool = True
) -> None:
    """Fetch a file of a model on the Hub into a folder, to change it there.

    Args:
        repo_id: "user/name".
        name: path inside of the repository, and of the folder.
        folder: where to.
        revision: branch, tag or commit.
        required: False: a file that the repository does not have is left out.

    Raises:
        ValueError: if there is no such repository or required file, or it cannot be had.
    """
    limit_waiting()
    try:
        _retry(lambda: hf_hub_download(repo_id, name, revision=revision, local_dir=folder), attempts=3)
    except PUSH_ERRORS as error:
        if isinstance(error, EntryNotFoundError) and not required:
            return
        raise ValueError(
            f"could not get {name} of {repo_id} (revision {revision}) from the Hub; expected OWNER/NAME of a model "
            f"that this package pushed ({_without_token(error)})"
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
            f"pushing to {repo_id} failed: {_without_token(error)}\n{repo_id} is as it was. {_advice(error)}Give the "
            "same command again"
        ) from None


def check_pull_request(repo_id: str) -> None:
    """Check before an evaluation that its pull request can be opened; nothing is changed on the Hub.

    Raises:
        ValueError: saying what to fix, if there is no token that the Hub accepts, or no such repository.
    """
    if get_token() is None:
        raise ValueError(
            "--create_pr needs a token, and there is none: run `hf auth login`, set HF_TOKEN, or evaluate without "
            "--push_to_hub"
        )
    limit_waiting()
    try:
        _retry(lambda: HfApi().whoami())
        _retry(lambda: HfApi().model_info(repo_id))
    except ACCESS_ERRORS as error:
        if _status(error) == 404:
            raise ValueError(
                f"--create_pr: there is no model {repo_id} on the Hub, or it is not for this token"
            ) from None
        raise ValueError(_access_problem(repo_id, DEFAULT_REVISION, error)) from None


def push_evaluation(
    folder: str | Path,
    repo_id: str,
    *,
    create_pr: bool,
    publish_images: bool = False,
    revision: str = DEFAULT_REVISION,
) -> str:
    """Push the ``EVALUATED`` files of a folder to a model's repository, as one commit or one pull request.

    A repository whose ``report.json`` is of more than an evaluation, such as of a training run, keeps it and its
    figures: the files then go into its folder ``evaluation``. For images the rule is that of `push_folder`. A pull
    request is tried once: one whose answer is lost may have been opened, and a second one would be somebody's work.

    Returns:
        The URL of the pull request or commit.

    Raises:
        FileNotFoundError: if the folder holds no evaluation.
        PushError: if the push failed.
    """
    folder = Path(folder)
    for name in (REPORT_NAME, EVALUATION_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: expected the output folder of an evaluation")
    limit_waiting()
    withheld = not publish_images and _withholds_images(folder)
    replaced = _without_images(folder) if withheld else {}
    found = sorted(path.relative_to(folder).as_posix() for pattern in EVALUATED for path in folder.glob(pattern))

    def upload() -> Any:  # noqa: ANN401 (the client's CommitInfo)
        place = "evaluation/" if _keeps_its_report(repo_id, revision) else ""
        operations = [
            CommitOperationAdd(
                path_in_repo=name if name.startswith(EVAL_RESULTS) else place + name,
                path_or_fileobj=replaced.get(name) or str(folder / name),
            )
            for name in found
            if not (withheld and name in IMAGES)
        ]
        return HfApi().create_commit(
            repo_id,
            operations,
            commit_message="Robustness per class, measured by ham_hf",
            create_pr=create_pr,
            revision=revision,
        )

    try:
        commit = _retry(upload, 1 if create_pr else 3, also=CONFLICTS)
    except PUSH_ERRORS as error:
        again = _push_command(folder, repo_id, revision, create_pr=create_pr, publish_images=publish_images)
        raise PushError(
            f"pushing the evaluation to {repo_id} failed: {_without_token(error)}\nIt is complete in "
            f"{folder.resolve()}. {_advice(error)}Push it again with:\n    {again}"
        ) from None
    return str(commit.pr_url or commit.commit_url)


def _keeps_its_report(repo_id: str, revision: str) -> bool:
    """Whether a repository has a ``report.json`` that is not of an evaluation alone."""
    try:
        report = read_report(hf_hub_download(repo_id, REPORT_NAME, revision=revision))
    except EntryNotFoundError:
        return False
    except ValueError:  # somebody else's file
        return True
    return report.training is not None or report.calibration is not None


def start_push(folder: str | Path, repo_id: str, *, patience: float, **options: str) -> threading.Thread:
    """Run `try_push` on a thread, and return when it ends or after ``patience`` seconds.

    The other processes of a run wait for this one at the next update, and give up after ``--ddp_timeout``: a slow push
    must not block them. The thread is a daemon, so a run that ends or is stopped does not wait for it either.
    """
    push = threading.Thread(target=try_push, args=(folder, repo_id), kwargs=options, daemon=True)
    push.start()
    push.join(patience)
    return push


def has_ended(push: threading.Thread | None, *, patience: float | None) -> bool:
    """Wait for ``push``, if there is one, at most ``patience`` seconds (None: no limit); True if it has ended."""
    if push is not None:
        push.join(patience)
    return push is None or not push.is_alive()


class SavePushes:
    """The pushes of a run's saves: one at a time, each on a thread.

    Args:
        folder: output folder of the run.
        repo_id: "user/name".
        revision: branch to push to.
        patience: seconds to wait for a push, each time.
    """

    def __init__(self, folder: str | Path, repo_id: str, *, revision: str, patience: float) -> None:
        self.folder, self.repo_id, self.revision, self.patience = folder, repo_id, revision, patience
        self._last: threading.Thread | None = None

    def push(self, export: Callable[[], object], *, commit_message: str) -> None:
        """Push what ``export`` writes into the folder; while an earlier push is under way, write and push nothing."""
        if not has_ended(self._last, patience=self.patience):
            logger.warning("an earlier push is still under way: the next save pushes again")
            return
        export()
        self._last = start_push(
            self.folder, self.repo_id, patience=self.patience, revision=self.revision, commit_message=commit_message
        )

    def wait(self) -> None:
        """Wait for the last push to end."""
        has_ended(self._last, patience=None)


def download_results(repo_id: str, revision: str | None = None) -> Path:
    """Fetch ``report.json`` and, where there is one, ``predictions.parquet`` of a model on the Hub, as they are now.

    Both are of one commit. In offline mode they come from the Hub's cache.

    Returns:
        The folder that they are in, in the Hub's cache.

    Raises:
        ValueError: if that fails, or a file has more than ``MAX_RESULT_BYTES``.
    """
    limit_waiting()
    names, commit = [REPORT_NAME], revision
    try:
        if not constants.HF_HUB_OFFLINE:
            found = _retry(lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True))
            sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
            names, commit = [REPORT_NAME, *({PREDICTIONS_NAME} & {*sizes})], found.sha
            for name in names:
                if sizes.get(name, 0) > MAX_RESULT_BYTES:
                    raise ValueError(f"{name} has {sizes[name]:,} bytes, more than {MAX_RESULT_BYTES:,}")
        paths = [_retry(partial(hf_hub_download, repo_id, name, revision=commit)) for name in names]
    except PUSH_ERRORS as error:
        raise ValueError(
            f"could not get {REPORT_NAME} of {repo_id} from the Hub; expected OWNER/NAME of a model that this package "
            f"pushed ({_without_token(error)})"
        ) from None
    return Path(paths[0]).parent


def limit_waiting() -> None:
    """Apply ``SILENCE_LIMIT`` and ``WAIT_LIMIT`` to every later request of huggingface_hub; repeating it is harmless.

    ``datasets`` and ``timm`` use the same client. Transfers by the library hf_xet have their own limits.
    """
    client: Any = get_session()  # an httpx or httpx2 client, depending on the version
    hooks, same = client.event_hooks, {"follow_redirects": client.follow_redirects, "timeout": client.timeout}
    if _limit_silence not in hooks["request"]:
        limited = {"request": [*hooks["request"], _limit_silence], "response": [*hooks["response"], _limit_wait]}
        set_client_factory(lambda: type(client)(event_hooks=limited, **same))


def asked_wait(headers: Mapping[str, str]) -> int | None:
    """Seconds that the headers ``Retry-After`` (unless it is a date) and ``RateLimit`` ask to wait, or None."""
    limit = parse_ratelimit_headers(headers)
    waits = [limit.reset_in_seconds] if limit is not None and limit.remaining == 0 else []
    after = {name.lower(): value for name, value in headers.items()}.get("retry-after", "").strip()
    return max([*waits, int(after)] if after.isascii() and after.isdigit() else waits, default=None)


def _limit_silence(request: Any) -> None:  # noqa: ANN401 (of httpx or httpx2)
    # A default of the client would not do: some calls pass None, which overrides it.
    limits = request.extensions.get("timeout", {})
    phases = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {phase: limits.get(phase) or SILENCE_LIMIT for phase in phases}


def _limit_wait(response: Any) -> None:  # noqa: ANN401
    wait = asked_wait(response.headers) if response.status_code in (429, 503) else None
    if wait is not None and wait > WAIT_LIMIT:
        raise AskedToWaitError(
            f"status {response.status_code}, the Hub asks to come back in {wait} s, which is longer than the "
            f"{WAIT_LIMIT} s that a run waits for"
        )


def _create_branch(api: HfApi, repo_id: str, branch: str) -> None:
    try:
        api.create_branch(repo_id, branch=branch)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:  # it exists; without write access the answer is 403 either way
            raise


def _retry(action: Callable[[], T], attempts: int = 3, also: Collection[int] = ()) -> T:
    """Call ``action`` again after temporary failures and statuses in ``also``, after 1, 2, 4 ... s or as asked."""
    for attempt in range(1, attempts):
        try:
            return action()
        except NETWORK_ERRORS as error:  # noqa: PERF203 (trying again is the point)
            if not (_is_temporary(error) or _status(error) in also):
                raise
            asked = asked_wait(error.response.headers) if isinstance(error, HfHubHTTPError) else None
            wait = min(max(2 ** (attempt - 1), asked or 0), WAIT_LIMIT)
            logger.warning("The Hub did not do it (%s); trying again in %d s", _without_token(error), wait)
            time.sleep(wait)
    return action()


def _status(error: Exception) -> int | None:
    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None


def _is_temporary(error: Exception) -> bool:
    """True for a busy server and a lost connection; False for a refusal and for an unreadable local file."""
    if isinstance(error, HfHubHTTPError):
        return _status(error) in RETRIED_STATUS
    if isinstance(error, (OfflineModeIsEnabled, AskedToWaitError)):
        return False
    # Other built-in OSErrors are about local files.
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__ != "builtins"


def _advice(error: Exception) -> str:
    """What to fix before pushing again, ending with a space; empty if nothing is known."""
    return {
        401: "The token is not accepted: run `hf auth login` or renew HF_TOKEN first. ",
        403: "The token may not write there: get the rights, or take another --hub_model_id. ",
        404: "There is no such repository or branch now: the command below makes it again. ",
    }.get(_status(error) or 0, "")


def _access_problem(repo_id: str, revision: str, error: Exception) -> str:
    """Explain ``error``, raised by a request before training, and how to fix it."""
    push, hub, status = "--push_to_hub:", constants.ENDPOINT, _status(error)
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
    return f"{problem}. ({_without_token(error)})"


def _without_token(error: Exception) -> str:
    """The text of ``error`` with everything that is or looks like an access token masked."""
    message = f"{type(error).__name__}: {error}"
    if token := get_token():
        message = message.replace(token, "***")
    return re.sub(r"\bhf_\w{8,}", "hf_***", message)
