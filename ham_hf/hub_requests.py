"""Requests to the Hub: bound how long one may take, repeat it after temporary failures, keep the token out of texts.

huggingface_hub retries a failed request up to five times, 1, 2, 4, 8 and 8 seconds apart. By default its client waits
forever for an answer, and sleeps through any ``Retry-After``, even a day. `limit_waiting` bounds both (the values are
our choice), so a single request takes at most six time-outs and 23 seconds.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from json import JSONDecodeError
from typing import Any, TypeVar

from huggingface_hub import get_session, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
CONFLICTS = (409, 412)
"""Another commit landed meanwhile. A repeated push commits on top of it."""

SILENCE_LIMIT = 60.0
"""Seconds within which a server must send or take at least one byte, for requests without their own limit."""
WAIT_LIMIT = 60
"""Longest wait in seconds that a server may ask for."""
# huggingface_hub uses httpx or httpx2, depending on the version; its error derives from the base class of either.
NETWORK_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
STRANGE_ANSWERS = (LookupError, TypeError, AttributeError, JSONDecodeError)
"""Exceptions of huggingface_hub when something other than a Hub answers, such as the login page of a network."""
ACCESS_ERRORS: tuple[type[Exception], ...] = (*NETWORK_ERRORS, *STRANGE_ANSWERS)
# RuntimeError: the transfer library (hf_xet); ValueError: metadata in README.md that the Hub refuses.
PUSH_ERRORS: tuple[type[Exception], ...] = (*ACCESS_ERRORS, RuntimeError, ValueError)


class AskedToWaitError(OSError):
    """The Hub asks for a longer wait than ``WAIT_LIMIT``."""


def limit_waiting() -> None:
    """Apply ``SILENCE_LIMIT`` and ``WAIT_LIMIT`` to every later request of huggingface_hub, ``datasets`` and ``timm``.

    Transfers by the library hf_xet have their own limits.
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


def retry(action: Callable[[], T], attempts: int = 3, also: Collection[int] = ()) -> T:
    """Repeat ``action`` after temporary failures and statuses in ``also``, waiting 1, 2, 4 ... s or as asked.

    `limit_waiting` holds for it.
    """
    limit_waiting()
    for attempt in range(1, attempts):
        try:
            return action()
        except NETWORK_ERRORS as error:  # noqa: PERF203 (trying again is the point)
            if not (_is_temporary(error) or status_of(error) in also):
                raise
            asked = asked_wait(error.response.headers) if isinstance(error, HfHubHTTPError) else None
            wait = min(max(2 ** (attempt - 1), asked or 0), WAIT_LIMIT)
            logger.warning("The Hub request failed (%s); trying again in %d s", without_token(error), wait)
            time.sleep(wait)
    return action()


def status_of(error: Exception) -> int | None:
    """The HTTP status of an error; None if it has none."""
    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None


def _is_temporary(error: Exception) -> bool:
    """True for a busy server and a lost connection; False for a refusal and for an unreadable local file."""
    if isinstance(error, HfHubHTTPError):
        return status_of(error) in RETRIED_STATUS
    if isinstance(error, (OfflineModeIsEnabled, AskedToWaitError)):
        return False
    # Other built-in OSErrors are about local files.
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__ != "builtins"


def without_token(error: Exception) -> str:
    """The text of ``error`` with everything that is or looks like an access token masked."""
    message = f"{type(error).__name__}: {error}"
    if token := get_token():
        message = message.replace(token, "***")
    return re.sub(r"\bhf_\w{8,}", "hf_***", message)
