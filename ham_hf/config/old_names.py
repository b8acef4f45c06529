"""Settings of earlier versions: read from a file where they mean something that can still be said, else refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import yaml

from ham_hf.config.yaml_text import Entry, show_node, text_node
from ham_hf.settings import ConfigError

logger = logging.getLogger(__name__)

KEPT_EASY = ("keep_easy_fraction", "keep_easy_as")
"""Options of ``--method ham`` up to 0.1: the fraction of easy examples kept with weight 1, and which image of them."""


def with_current_names(entries: Sequence[Entry]) -> list[Entry]:
    """The settings as written, with those of earlier versions in a file put into today's words.

    ``keep_easy_fraction`` F was ``easy_weight`` 1 and ``easy_fraction`` F; 0 was ``easy_weight`` 0.

    Raises:
        ConfigError: for ``keep_easy_as: clean`` with a fraction, which is gone; for an old name as a flag, or beside a
            new one in the same file. Each names the setting that took its place.
    """
    old = {entry.name: entry for entry in entries if entry.name in KEPT_EASY}
    if not old:
        return list(entries)
    flags = [entry for entry in old.values() if not entry.origin]
    beside = [entry for entry in entries if entry.origin and entry.name in ("easy_weight", "easy_fraction")]
    if flags or beside:
        raise ConfigError(
            f"{entry.origin}--{entry.name} is now --easy_weight (1 keeps easy examples in the loss) with "
            "--easy_fraction (which share of them, the most confident first)"
            for entry in flags or old.values()
        )
    rest = [entry for entry in entries if entry.name not in KEPT_EASY]
    fraction = old.get("keep_easy_fraction")
    if fraction is None or _is_zero(fraction.node):
        return rest
    kept_as = old.get("keep_easy_as")
    if kept_as is not None and show_node(kept_as.node) != "adversarial":
        raise ConfigError(
            f"{kept_as.origin}keep_easy_as {show_node(kept_as.node)}: easy examples are kept at their image of "
            "mining_step alone, with --easy_weight and --easy_fraction; leave keep_easy_as out"
        )
    logger.info("keep_easy_fraction of %s is read as easy_weight 1 with this easy_fraction", fraction.origin[:-2])
    return [
        Entry("easy_weight", text_node("1"), fraction.origin),
        Entry("easy_fraction", fraction.node, fraction.origin),
        *rest,
    ]


def _is_zero(node: yaml.Node) -> bool:
    try:
        return float(show_node(node)) == 0
    except ValueError:
        return False
