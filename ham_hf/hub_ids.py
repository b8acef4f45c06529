"""Ids of repositories on the Hub."""

from __future__ import annotations

import re

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?!.*(?:--|\.\.))(?:(?P<owner>{_PART})/)?{_PART}(?<!\.git)", re.ASCII)


def is_hub_id(text: str, *, with_owner: bool = False) -> bool:
    """Whether ``text`` can be the id of a repository, ``owner/name`` or, unless ``with_owner``, ``name``.

    The rules are those of ``huggingface_hub.utils.validate_repo_id``: each part has at most 96 letters, digits, "_",
    "-" and ".", with a letter, digit or "_" at both ends, and there is no "--", no ".." and no ".git" at the end.
    """
    found = _ID.fullmatch(text)
    return found is not None and (found["owner"] is not None or not with_owner)


def split_revision(source: str) -> tuple[str, str | None] | None:
    """Id and revision of ``[hf-hub:]OWNER/NAME[@REVISION]``; None if ``source`` is something else."""
    hub_id, at, revision = source.removeprefix("hf-hub:").partition("@")
    if not is_hub_id(hub_id, with_owner=True) or (at and not re.fullmatch(r"\S+", revision)):
        return None
    return hub_id, revision or None
