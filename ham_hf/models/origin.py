"""License, base model and tags from a model's card, for models made of it.

The card is untrusted text: only its first part is read, and only short words are taken from it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ham_hf.models.source import complete_name, fetch_card, resolve_source

logger = logging.getLogger(__name__)

MAX_BYTES = 2**20
UNKNOWN_LICENSE = "unknown"
"""The Hub's word for a license that is not stated."""
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_WORD = re.compile(r"[\w.:+-]{1,80}", re.ASCII)
_REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from.

    Attributes:
        license: of its weights, a Hub license id; `UNKNOWN_LICENSE` if neither card nor ``config.json`` says it.
        base_model: its id on the Hub or, for a folder, the base model that its card names; None if there is neither.
        tags: of its card.
    """

    license: str
    base_model: str | None
    tags: tuple[str, ...]


def read_origin(source: str, *, revision: str | None = None) -> Origin:
    """Read card and ``config.json`` of a model, named as for `ham_hf.models.load_pixel_model`.

    Raises:
        ValueError: if there is no such model.
    """
    name = complete_name(source, revision)
    resolved = resolve_source(name)
    card = _front_matter(fetch_card(name, resolved.hub_id))
    licenses = _matching(_WORD, [card.get("license"), resolved.pretrained_cfg.get("license")])
    bases = _matching(_REPO_ID, [resolved.hub_id, *_as_list(card.get("base_model"))])
    return Origin(
        license=licenses[0].lower() if licenses else UNKNOWN_LICENSE,
        base_model=bases[0] if bases else None,
        tags=tuple(_matching(_WORD, _as_list(card.get("tags"))[:100])),
    )


def _front_matter(path: Path | None) -> dict[str, Any]:
    """The YAML block at the beginning of a card; empty where there is none that can be read."""
    if path is None:
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        found = _FRONT_MATTER.match(file.read(MAX_BYTES))
    if found is None:
        return {}
    try:
        values = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        logger.warning("the metadata of %s cannot be read: %s", path.name, " ".join(str(error).split())[:200])
        return {}
    return values if isinstance(values, dict) else {}


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _matching(pattern: re.Pattern[str], values: Iterable[object]) -> list[str]:
    return [value for value in values if isinstance(value, str) and pattern.fullmatch(value)]
