"""How long a request to the Hub may keep a run waiting.

huggingface_hub tries a failed request up to five times more, 1, 2, 4, 8 and 8 seconds apart, and waits for as long as
the Hub asks for. Left to itself it has no limit for two things: its client waits forever for an answer that never
comes, and sleeps through any ``Retry-After``, be it a day. Here both get one (the values are our choice), so that the
longest a single request can take is known: six time-outs and 23 seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub.utils import _http

SILENCE_LIMIT = 60.0
"""Seconds in which a server must send or take at least one byte; a request that has a limit of its own keeps it."""
WAIT_LIMIT = 60
"""Longest wait that a server may ask for, in seconds."""

_NOTHING_LEFT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")
"""Of the header ``RateLimit``, which the Hub sends with every answer: no request is left for so many seconds."""


class AskedToWaitError(OSError):
    """The Hub asks to come back later than a run waits for."""


def limit_waiting() -> None:
    """Give every request that huggingface_hub makes from here on the limits of this module; repeating it is harmless.

    ``datasets`` and ``timm`` go through the same client. Transfers by the library hf_xet have limits of their own.
    """
    library: Any = _http  # what it has depends on the version
    if not hasattr(library, "set_client_factory"):  # before 1.0, with requests
        library.configure_http_backend(_limited_session)
    elif library._GLOBAL_CLIENT_FACTORY is not _limited_client:
        library.set_client_factory(_limited_client)


def asked_wait(headers: Mapping[str, str]) -> int | None:
    """Seconds that an answer asks to wait for (``Retry-After`` or ``RateLimit``, not a date); None if it does not."""
    lower = {name.lower(): value for name, value in headers.items()}
    waits = [int(found[1])] if (found := _NOTHING_LEFT.search(lower.get("ratelimit", ""))) else []
    after = lower.get("retry-after", "").strip()
    return max([*waits, int(after)] if after.isascii() and after.isdigit() else waits, default=None)


def _limited_client() -> Any:  # noqa: ANN401 (httpx or httpx2, by version)
    library: Any = _http
    client = library.default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _limit_silence],
        "response": [*hooks["response"], lambda response: _limit_wait(response.status_code, response.headers)],
    }
    return client


def _limit_silence(request: Any) -> None:  # noqa: ANN401
    # Some calls pass None by themselves, which a default of the client would not replace.
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: limits.get(name) or SILENCE_LIMIT for name in ("connect", "read", "write", "pool")
    }


def _limit_wait(status: int, headers: Mapping[str, str]) -> None:
    wait = asked_wait(headers) if status in (429, 503) else None
    if wait is not None and wait > WAIT_LIMIT:
        raise AskedToWaitError(
            f"status {status}, the Hub asks to come back in {wait} s, which is longer than the {WAIT_LIMIT} s that a "
            "run waits for"
        )


def _limited_session() -> Any:  # noqa: ANN401
    library: Any = _http
    session = library._default_backend_factory()
    for adapter in session.adapters.values():
        adapter.send = _limited(adapter.send)
    return session


def _limited(send: Callable[..., Any]) -> Callable[..., Any]:
    def limited(request: object, **options: Any) -> Any:  # noqa: ANN401
        response = send(request, **{**options, "timeout": options.get("timeout") or SILENCE_LIMIT})
        _limit_wait(response.status_code, response.headers)
        return response

    return limited
