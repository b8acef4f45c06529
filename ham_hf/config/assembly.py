"""Build a configuration from parsed entries: resolve the method, reject unknown names, collect every error.

Settings of earlier versions are read from a file where their meaning can still be expressed, else rejected.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import yaml

from ham_hf.config.configs import DEFAULT_METHOD, AnyConfig, TrainConfig, available_methods
from ham_hf.config.yaml_file import Entry, read_value, read_yaml, show_node, text_node
from ham_hf.settings import ConfigError, Setting, settings_of

if TYPE_CHECKING:
    from ham_hf.methods import Method

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=AnyConfig)

# Names used by timm, transformers and attack libraries, where spelling alone would not lead to ours.
_KNOWN_ELSEWHERE = {
    "learning_rate": "lr base_lr",
    "weight_decay": "wd",
    "lr_drops": "lr_decay milestones",
    "num_train_epochs": "epoch epochs",
    "max_grad_norm": "clip_grad grad_clip",
    "num_steps": "attack_steps attack_iters pgd_steps",
    "eval_num_steps": "attack_steps attack_iters pgd_steps",
    "step_size": "alpha",
    "eval_step_size": "alpha",
    "mixed_precision fp16": "fp16",
    "mixed_precision bf16": "bf16 amp",
    "use_cpu": "no_cuda device",
    "dataset_name": "data_dir data_path",
    "image_size": "input_size resolution",
    "report_to": "wandb tensorboard log_wandb",
    "model": "arch architecture backbone checkpoint",
    "model_name": "arch architecture backbone",
}


def load_train_config(path: Path | str) -> TrainConfig:
    """Read a recipe, or the ``train_config.yaml`` that a run wrote.

    Raises:
        ConfigError: naming the file, the line and everything that is wrong.
    """
    return build_config(TrainConfig, read_yaml(Path(path)))


def method_settings() -> dict[str, tuple[Setting, ...]]:
    """The options of every available training method, by the method's name."""
    return {name: settings_of(kind) for name, kind in available_methods().items()}


def group_settings(config_class: type) -> dict[str, tuple[Setting, ...]]:
    """Settings of each group by its attribute; under ``""`` those of the class itself. Methods are not included."""
    groups = {attribute: settings_of(kind) for attribute, kind in _group_classes(config_class).items()}
    return {"": settings_of(config_class), **groups}


def _group_classes(config_class: type) -> dict[str, type]:
    titled = [declared for declared in fields(config_class) if "title" in declared.metadata]
    return {declared.name: cast(type, declared.default_factory) for declared in titled if declared.name != "method"}


def build_config(config_class: type[ConfigT], entries: Sequence[Entry], required: Iterable[str] = ()) -> ConfigT:
    """Make a configuration from the entries of files (first) and flags (last; they win).

    ``required`` are names of settings that have to be given although they have a default.

    Raises:
        ConfigError: with every problem of a single setting or, if there is none, of their combination.
    """
    groups = group_settings(config_class)
    entries = with_current_names(entries)
    required = {*required, *(known.name for known in groups[""] if known.default is MISSING)}
    known = {one.name: one for group in groups.values() for one in group}
    missing = sorted(required - {entry.name for entry in entries})
    problems = [f"--{name} is required: {known[name].help}" for name in missing]
    method: type[Method] | None = None
    if config_class is TrainConfig:
        method, entries = _choose_method(entries)
        known |= {one.name: one for one in settings_of(method)}
    values: dict[str, object] = {}
    for entry in entries:
        if entry.name not in known:
            problems.append(entry.origin + _unknown_name(entry.name, known, method))
            continue
        try:
            values[entry.name] = read_value(known[entry.name], entry.node)
        except ValueError as error:
            reason = f" ({error})" if str(error) else ""
            shown = show_node(entry.node)
            problems.append(f"{entry.origin}--{entry.name} {shown}: expected {known[entry.name].expected}{reason}")
    if problems:
        raise ConfigError(problems)
    return _assemble(config_class, method, values)


def _choose_method(entries: Sequence[Entry]) -> tuple[type[Method], list[Entry]]:
    """The training method, and the entries that remain to be read for it.

    When a flag replaces the method of a recipe, the options of the recipe's method are dropped.
    """
    methods = available_methods()

    def last_method(candidates: list[Entry]) -> type[Method] | None:
        written = [entry for entry in candidates if entry.name == "method"]
        if not written:
            return None
        node = written[-1].node
        name = node.value if isinstance(node, yaml.ScalarNode) else show_node(node)
        if name not in methods or not isinstance(node, yaml.ScalarNode):
            expected = "expected one of " + ", ".join(methods)
            raise ConfigError(f"{written[-1].origin}--method {name}: {expected}{_nearest(name, methods)}")
        return methods[name]

    in_file = last_method([entry for entry in entries if entry.origin]) or methods[DEFAULT_METHOD]
    chosen = last_method([entry for entry in entries if not entry.origin]) or in_file
    rest = [entry for entry in entries if entry.name != "method"]
    if chosen is in_file:
        return chosen, rest
    options = {known.name for known in settings_of(in_file)}
    dropped = [entry for entry in rest if entry.origin and entry.name in options]
    if dropped:
        names = ", ".join(entry.name for entry in dropped)
        logger.info("--method %s replaces %s and its options %s", chosen.name, in_file.name, names)
    return chosen, [entry for entry in rest if entry not in dropped]


def _unknown_name(name: str, known: Mapping[str, Setting], method: type[Method] | None) -> str:
    """Say why ``name`` is not a setting here, with the nearest one that is."""
    if method is not None:
        owners = [owner for owner, options in method_settings().items() if name in {one.name for one in options}]
        if owners:
            return f"--{name} is an option of --method {', '.join(owners)}, and the method is {method.name}"
    names = [*known, "method"] if method is not None else list(known)
    return f"there is no setting {name!r}{_nearest(name, names, prefix='--')}"


def _nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    names = list(names)
    name = name.lower().replace("-", "_")
    near = [ours for ours, aliases in _KNOWN_ELSEWHERE.items() if name in aliases.split() and ours.split()[0] in names]
    if not near and len(name) > 2:
        # The first of the shortest names whose words begin with all of its words, or the one most alike in spelling.
        begun = [ours for ours in names if all(f"_{word}" in f"_{ours}" for word in name.split("_"))]
        near = sorted(begun, key=lambda ours: ours.count("_")) or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _assemble(config_class: type[ConfigT], method: type[Method] | None, values: Mapping[str, object]) -> ConfigT:
    """Put values that are valid by themselves into their groups, and those into the configuration."""

    def given(kind: type) -> dict[str, Any]:
        return {known.name: values[known.name] for known in settings_of(kind) if known.name in values}

    parts = given(config_class)
    problems: list[str] = []
    for attribute, kind in _group_classes(config_class).items():
        try:
            parts[attribute] = kind(**given(kind))
        except ConfigError as error:  # noqa: PERF203 (every problem is wanted, not the first)
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    if method is not None:
        parts["method"] = method(**given(method))
    return config_class(**parts)


KEPT_EASY = ("keep_easy_fraction", "keep_easy_as")
"""Options of ``--method ham`` up to 0.1: the fraction of easy examples kept with weight 1, and which image of them."""


def with_current_names(entries: Sequence[Entry]) -> list[Entry]:
    """Replace settings of earlier versions in a file by today's.

    ``keep_easy_fraction`` F was ``easy_weight`` 1 and ``easy_fraction`` F; 0 was ``easy_weight`` 0.

    Raises:
        ConfigError: naming the new setting, for ``keep_easy_as: clean`` with a fraction, for an old name as a flag,
            and for one beside a new one in the same file.
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
    if fraction is None or show_node(fraction.node) in ("0", "0.0"):
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
