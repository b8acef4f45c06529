"""Command lines: flags and a recipe in, a checked configuration out.

A setting's flag is ``--its_name``, with ``-`` and ``_`` alike; ``--config`` names a YAML file with the same names,
and flags win over it. An invalid command line ends the program with status 2 and a message, without a traceback.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import yaml

from ham_hf.config.assembly import ConfigT, build_config, group_settings, method_settings
from ham_hf.config.configs import DEFAULT_METHOD, CalibrateConfig, EvaluateConfig, TrainConfig, available_methods
from ham_hf.config.yaml_file import Entry, config_to_yaml, exact_fraction, mapping_node, read_yaml, text_node
from ham_hf.invocation import command, find_recipe, program
from ham_hf.settings import ConfigError, Setting, settings_of
from ham_hf.terminal import show

if TYPE_CHECKING:
    from ham_hf.methods import Method

logger = logging.getLogger(__name__)


class _Screen(NamedTuple):
    """First help screen: command, what it does, settings in few words ("" = their help), and what must be given."""

    command: str
    about: str
    settings: Mapping[str, str]
    required: tuple[str, ...] = ()


_EVALUATED = {
    "norm": "linf or l2; none = as it was trained",
    "epsilon": "radius in pixel units; none = as it was trained",
    "eval_num_steps": "steps of the PGD and CW attacks",
    "autoattack": "also run standard AutoAttack",
    "per_device_eval_batch_size": "images at once",
    "limit_test_examples": "use this many test images",
    "seed": "seed of the attacks",
    "use_cpu": "",
    "output_dir": "folder for everything it writes",
}
_SCREENS: dict[type, _Screen] = {
    TrainConfig: _Screen(
        "train",
        "Train a timm backbone adversarially, evaluate it per class, and write a model for\n"
        "plain timm with its card. Alone it trains on digits, by their recipe: 1 to 2 minutes.",
        {
            "dataset_name": "Hub dataset id, local folder, or digits",
            "model_name": "any timm model name",
            "pretrained": "start from timm's pretrained weights",
            "method": "how to train",
            "norm": "linf or l2",
            "epsilon": "radius of the attack in pixel units",
            "num_train_epochs": "",
            "per_device_train_batch_size": "images per process and step",
            "learning_rate": "",
            "seed": "seed of everything",
            "autoattack": "also run standard AutoAttack at the end",
            "output_dir": "folder for everything the run writes",
            "resume_from_checkpoint": "latest, or a checkpoint's folder",
            "push_to_hub": "push the output folder to the Hub",
            "hub_model_id": "",
        },
    ),
    EvaluateConfig: _Screen(
        "evaluate",
        "Measure the robustness per class of any model on any dataset.",
        {
            "model": "Hub id, folder or timm name; the first word",
            "dataset_name": "Hub dataset id, local folder, or digits",
            "test_split": "split to test on; none = found by rule",
            **_EVALUATED,
        },
        required=("dataset_name",),
    ),
    CalibrateConfig: _Screen(
        "calibrate",
        "Make a robust model fairer without training: one number per class, found on\nheld-out images.",
        {
            "model": "Hub id, folder or timm name; the first word",
            "dataset_name": "data that the model was trained on",
            "calibration_split": "split to find the numbers on",
            "fairness": "how much fairness, 0 to 1",
            "max_average_drop": "or: how much average it may cost",
            **_EVALUATED,
        },
    ),
}

_ON_OFF = {"true": True, "false": False}

_LANGUAGE = (
    "A setting is --name VALUE or --name=VALUE, with - or _. Numbers may be fractions (8/255). Turn a setting on "
    "with --name and off with --no_name. A recipe is YAML with the same names; flags win over it."
)


def parse_train_config(argv: Sequence[str] | None = None, *, default_recipe: Path | None = None) -> TrainConfig:
    """Read the command line of a training run.

    Args:
        argv: words after the program's name; None = those of this process.
        default_recipe: the recipe to take when the command line names neither a recipe nor a dataset.

    Raises:
        SystemExit: status 2 for an invalid command line or recipe, 0 after ``--help`` or ``--print_config``.
    """
    config = _parse(TrainConfig, argv, default_recipe=default_recipe)
    attack = config.attack
    # The trainer knows whether --max_steps ends the run before that.
    for what, (first, words) in config.method.starts(config.training.first_perturbed_epoch).items():
        if first >= config.training.num_train_epochs:
            logger.warning(
                "%s starts at %s, and the run has %d epochs: it will never be active.",
                what,
                words,
                config.training.num_train_epochs,
            )
    if attack.num_steps * attack.step_size < attack.epsilon * (1 - 1e-9):
        logger.warning(
            "--num_steps %d of --step_size %.4g reach %.4g, less than --epsilon %.4g: the attack cannot leave the "
            "neighborhood of its random start",
            attack.num_steps,
            attack.step_size,
            attack.num_steps * attack.step_size,
            attack.epsilon,
        )
    return config


def parse_evaluate_config(argv: Sequence[str] | None = None) -> EvaluateConfig:
    """Read the command line of an evaluation. The model is named by the first word or by ``--model``.

    Arguments and errors are those of `parse_train_config`.
    """
    return _parse(EvaluateConfig, argv)


def parse_calibrate_config(argv: Sequence[str] | None = None) -> CalibrateConfig:
    """Read the command line of a calibration, as `parse_evaluate_config` does."""
    return _parse(CalibrateConfig, argv)


def _parse(config_class: type[ConfigT], argv: Sequence[str] | None, *, default_recipe: Path | None = None) -> ConfigT:
    argv = sys.argv[1:] if argv is None else argv
    topic = _help_topic(argv)
    # The first screen shows no method's options: it needs no torch.
    parser = _Parser(config_class, with_methods=config_class is TrainConfig and topic != "")
    try:
        if topic is not None:
            show(parser.help_on(topic))
            parser.exit(0)
        flags, recipe, print_config = parser.read(argv)
        if recipe is None and default_recipe and "dataset_name" not in {entry.name for entry in flags}:
            logger.info("Neither --config nor --dataset_name is given: using %s", default_recipe)
            recipe = default_recipe
        written = read_yaml(recipe) if recipe is not None else []
        if {"recipe", "runs"} <= {entry.name for entry in written}:
            raise ConfigError(f"{recipe} plans a comparison: {command('compare')} --config {recipe}")
        config = build_config(config_class, [*written, *flags], parser.screen.required)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if print_config:
        sys.stdout.write(config_to_yaml(config))
        parser.exit(0)
    return config


class _Parser(argparse.ArgumentParser):
    """Splits a command line into entries: argparse does the words and the help, `build_config` the values."""

    def __init__(self, config_class: type, *, with_methods: bool) -> None:
        self.screen, groups = _SCREENS[config_class], group_settings(config_class)
        self.settings = {known.name: known for settings in groups.values() for known in settings}
        first = "MODEL " if "model" in self.settings else ""
        super().__init__(
            prog=program(self.screen.command),
            usage=f"%(prog)s {first}[--config RECIPE.yaml] [--SETTING VALUE ...]",
            description=_LANGUAGE,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.add_argument("--config", metavar="RECIPE.yaml", help="YAML file with settings")
        self.add_argument("--print_config", action="store_true", help="print the resolved settings as YAML, and stop")
        titles = {declared.name: declared.metadata.get("title") for declared in fields(config_class)}
        for attribute, settings in groups.items():
            _add_flags(self.add_argument_group(titles.get(attribute, "Model and output")), settings)
        if with_methods:
            self._add_methods()

    def _add_methods(self) -> None:
        """Take every method's options, so that `build_config` can say whose they are; help lists them by method."""
        listed = f"one of {', '.join(available_methods())} (default: {DEFAULT_METHOD})"
        self.add_argument_group("Method").add_argument("--method", metavar="METHOD", help=listed)
        for options in method_settings().values():
            new = [known for known in options if known.name not in self.settings]
            _add_flags(self, new, hidden=True)
            self.settings |= {known.name: known for known in new}

    def read(self, argv: Sequence[str]) -> tuple[list[Entry], Path | None, bool]:
        """Split ``argv`` into settings as written, the recipe's path, and whether to print the configuration."""
        namespace, extra = self.parse_known_args(self._canonical(argv))
        found = vars(namespace)
        recipe, print_config = found.pop("config", None), found.pop("print_config", False)
        entries = [Entry(name, self._node(name, written), "") for name, written in found.items()]
        strays = [word for word in extra if word != "--"]
        unknown = [word for word in strays if word.startswith("-") and not word[1:2].isdigit()]
        if strays and not strays[0].startswith("-") and "model" in self.settings and "model" not in found:
            entries.append(Entry("model", text_node(strays.pop(0)), ""))
        if strays and not unknown:
            raise ConfigError(f"unexpected word {strays[0]!r}; a setting is written --name value")
        entries.extend(Entry(word.lstrip("-").partition("=")[0] or word, text_node(word), "") for word in unknown)
        return entries, find_recipe(recipe) if recipe is not None else None, print_config

    def _node(self, name: str, written: str | list[str]) -> yaml.Node:
        if isinstance(written, list) and self.settings[name].is_mapping:
            return mapping_node(f"--{name}", written)
        return text_node(written)

    def _canonical(self, argv: Sequence[str]) -> list[str]:
        """Spell flags with ``_``, and ``--flag=false`` or ``--flag false`` of an on/off setting as ``--no_flag``."""
        switches = {f"--{known.name}" for known in self.settings.values() if known.kind is bool}
        words: list[str] = []
        for word in argv:
            flag, equals, value = with_underscores(word).partition("=")
            if flag in switches and equals:
                words.append(_switched(flag, value))
            elif words and words[-1] in switches and word.lower() in _ON_OFF:
                words[-1] = _switched(words[-1], word)
            else:
                words.append(f"{flag}{equals}{value}")
        return words

    def help_on(self, topic: str) -> str:
        """Text of ``--help TOPIC``: the first screen for "", every setting for "all", else one method's options."""
        if not topic:
            return self._first_screen()
        methods = available_methods() if "method" in self.screen.settings else {}
        if topic == "all":
            return self.format_help() + "".join(f"\n{_method_help(kind)}" for kind in methods.values())
        if topic not in methods:
            raise ConfigError(f"--help {topic}: expected {', '.join(['all', *methods])}")
        return _method_help(methods[topic])

    def _first_screen(self) -> str:
        rows = [("--config RECIPE", "YAML file, or a name that ham-hf recipes lists")]
        for name, what in self.screen.settings.items():
            if name == "method":
                rows.append(("--method METHOD", f"{what} [{DEFAULT_METHOD}]"))
                continue
            known = self.settings[name]
            default = "" if known.default in (None, MISSING) or known.default is False else f" [{_default(known)}]"
            default = " (required)" if name in self.screen.required else default
            # Choices take much room, and are in the words.
            metavar = "" if known.kind is bool else f" {'NAME' if known.choices else _metavar(known)}"
            rows.append((f"--{name}{metavar}", f"{what or known.help}{default}"))
        rest = [("--help all", "every setting")]
        if "method" in self.screen.settings:
            rest.append(("--help METHOD", f"the options of a method, as --help {DEFAULT_METHOD}"))
        rest += [
            ("--print_config", "the settings as YAML, and stop"),
            ("ham-hf recipes", "what --config takes by name"),
        ]
        width = max(len(flag) for flag, _ in rows)
        listed, more = ("".join(f"  {flag:{width}}  {what}\n" for flag, what in table) for table in (rows, rest))
        return f"{self.format_usage()}\n{self.screen.about}\n\n{listed}\nmore:\n{more}"

    def error(self, message: str) -> NoReturn:
        """Report what argparse found, such as a flag without its value, like every other problem."""
        if "expected one argument" in message:
            message += "; write --name=VALUE for a value that begins with '-'"
        raise ConfigError(message.removeprefix("argument "))


def _method_help(kind: type[Method]) -> str:
    """Help on the options of one training method."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    title = f"--method {kind.name}: {kind.summary}"
    _add_flags(parser.add_argument_group(title), settings_of(kind))
    return parser.format_help() or f"{title}\n"


def with_underscores(word: str) -> str:
    """A word of a command line; a flag with ``_`` for ``-`` inside of its name."""
    flag, equals, value = word.partition("=")
    flag = flag.replace("-", "_").replace("__", "--", 1) if word.startswith("--") else flag
    return f"{flag}{equals}{value}"


def _help_topic(argv: Sequence[str]) -> str | None:
    """The help topic that is asked for: None = none, "" = the first screen."""
    for at, word in enumerate(argv):
        flag, _, topic = word.partition("=")
        if flag in ("-h", "--help"):
            following = argv[at + 1] if at + 1 < len(argv) else "-"
            return topic or ("" if following.startswith("-") else following)
    return None


class _Switch(argparse.Action):
    """``--name`` or ``--no_name`` without a value."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, flag: str | None = None
    ) -> None:
        setattr(namespace, self.dest, str(flag == f"--{self.dest}").lower())


def _switched(flag: str, value: str) -> str:
    if value.lower() not in _ON_OFF:
        raise ConfigError(f"{flag} {value}: expected true or false")
    return flag if _ON_OFF[value.lower()] else f"--no_{flag[2:]}"


def _add_flags(group: argparse._ActionsContainer, settings: Iterable[Setting], *, hidden: bool = False) -> None:
    for known in settings:
        default = "required" if known.default is MISSING else f"default: {_default(known)}"
        limits = f"{known.limits}; " if known.limits else ""
        text = argparse.SUPPRESS if hidden else f"{known.help} ({limits}{default})".replace("%", "%%")
        if known.kind is bool:
            names = (f"--{known.name}", f"--no_{known.name}")
            group.add_argument(*names, dest=known.name, action=_Switch, nargs=0, help=text)
        else:
            many = "*" if known.is_list or known.is_mapping else None
            group.add_argument(f"--{known.name}", nargs=many, metavar=_metavar(known), help=text)


def _metavar(known: Setting) -> str:
    if known.is_mapping:
        return "KEY=VALUE"
    if known.choices:
        return "{" + ",".join(known.choices) + "}"
    return known.items or {int: "INT", float: "NUMBER"}.get(known.kind, "TEXT")


def _default(known: Setting) -> str:
    if isinstance(known.default, tuple):
        return " ".join(map(str, known.default)) or "none"
    if isinstance(known.default, bool):
        return "on" if known.default else "off"
    if known.default is None or known.default == {}:
        return "none"
    return str(exact_fraction(known.default) or known.default)
