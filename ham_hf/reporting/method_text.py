"""How a model card names, lists and cites a training method and what was combined with it, calibration included."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.resources import files

from ham_hf.config.assembly import KEPT_EASY
from ham_hf.methods import Method, available
from ham_hf.reporting.formats import percent
from ham_hf.reporting.report import CalibrationReport, TrainingReport
from ham_hf.settings import setting_problems

LENDERS = {"class_margin": "class radii", "class_weighting": "class weights"}
"""Settings that name another method, and the part borrowed from it."""

_BIBLIOGRAPHY = (files("ham_hf.reporting") / "citations.bib").read_text(encoding="utf-8")
_ENTRY = re.compile(r"^% (\w+): (\S+)\n(@.*?title\s*=\s*\{([^\n]*)\},.*?^\})", re.DOTALL | re.MULTILINE)
_ENTRIES = _ENTRY.findall(_BIBLIOGRAPHY)
CITATIONS = {name: entry for name, _, entry, _ in _ENTRIES}
"""BibTeX of each method by its name, of adversarial weight perturbation ("awp"), class shifts, and attacks."""
PAPERS = {name: link for name, link, _, _ in _ENTRIES}
"""Where each of them can be read; the Hub makes a tag of a link to arXiv."""
_TITLES = {name: title.replace("{", "").replace("}", "") for name, _, _, title in _ENTRIES}
_ATTACKS = {"pgd": "pgd_at", "cw": "cw", "autoattack": "autoattack"}
"""The entry of each attack of an evaluation, by the first part of its name."""


def trained_method(config: Mapping[str, object]) -> Method | None:
    """The method of a report's settings with its options; None if this version does not know it.

    Raises:
        ValueError: naming a setting that the method cannot have; reports of the Hub may hold anything.
    """
    kind = available().get(str(config.get("method")))
    if kind is None:
        return None
    given = {field.name: config[field.name] for field in fields(kind) if field.name in config}
    # JSON has lists alone.
    method = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    problems = setting_problems(method) or [found for one in method.state_keepers for found in setting_problems(one)]
    if problems:
        raise ValueError(f"the settings of {kind.name} in the report: {'; '.join(problems)}")
    return method


def method_title(config: Mapping[str, object]) -> str:
    """Name of the method and, if this version knows it, its summary."""
    return _described(str(config.get("method", "unknown")))


def combined_with(config: Mapping[str, object]) -> str:
    """The combinations with the method, in words; empty if there are none."""
    parts = [f"the {what} of {config[setting]}" for setting, what in LENDERS.items() if _is_set(config.get(setting))]
    if config.get("awp_gamma") is not None:
        parts.append("adversarial weight perturbation")
    if gates_averaging(config):
        parts.append("fairness-gated averaging of weights")
    elif config.get("ema_decay") is not None:
        parts.append("an exponential moving average of weights")
    return ", ".join([*parts[:-2], " and ".join(parts[-2:])])


def method_rows(config: Mapping[str, object], *, averaged: bool) -> list[tuple[str, str]]:
    """Label and value of all settings of the method and of its combinations.

    Settings that are off or have no effect are left out. ``averaged``: whether a fairness-gated average let any epoch
    in; else its row says so.
    """
    rows = [("Method", method_title(config))]
    method = trained_method(config)
    if method is not None:
        if "base_loss" in config:
            rows.append(("Base loss", _described(str(config["base_loss"]))))
        unshown = {"base_loss", "class_rule_args", *LENDERS} | ({"beta"} if method.num_terms == 1 else set())
        if not config.get("easy_weight") or config.get("easy_fraction") == 1:
            unshown.add("easy_fraction")
        # An option whose default is 0 is off at 0.
        off = {field.name for field in fields(method) if field.default == 0 and config.get(field.name) == 0}
        options = [field.name for field in fields(method) if field.name not in unshown | off]
        rows += [
            (f"Method option {name}", option_text(name, config[name])) for name in options if _is_set(config.get(name))
        ]
        if config.get(KEPT_EASY[0]):
            rows += [(f"Method option {name}", in_words(config[name])) for name in KEPT_EASY if name in config]
    rows += [
        (what.capitalize(), _described(str(config[setting])))
        for setting, what in LENDERS.items()
        if _is_set(config.get(setting))
    ]
    if config.get("class_rule_args"):
        rows.append(("Options of class radii and weights", in_words(config["class_rule_args"])))
    if config.get("awp_gamma") is not None:
        start = config.get("awp_start_epoch")
        since = f", from {option_text('awp_start_epoch', start)} on" if start else ""
        rows.append(("Adversarial weight perturbation", f"gamma {config['awp_gamma']}{since} (Wu et al., 2020)"))
    if gates_averaging(config):
        gate = f"decay {config['fawa_decay']}, worst class at least {config['fawa_threshold']}"
        never = "" if averaged else "; no epoch up to the selected one passed, so these weights are not averaged"
        rows.append(("Averaged weights", f"fairness-gated, once per epoch: {gate} (Wei et al., 2023){never}"))
    elif config.get("ema_decay") is not None:
        rows.append(("Averaged weights", f"exponential moving average, decay {config['ema_decay']} per update"))
    return rows


def never_active(config: Mapping[str, object], num_epochs: int) -> str:
    """Names of methods and combinations that begin after the last of the epochs that were trained; often empty."""
    return ", ".join(name for name, (first, _) in _starts(config).items() if first >= num_epochs)


def method_began(config: Mapping[str, object], training: TrainingReport) -> bool:
    """Whether the method differed from its base loss in any epoch up to the one of the selected weights."""
    first, _ = _starts(config).get(str(config.get("method")), (0, ""))
    last = training.num_train_epochs - 1 if training.selected_epoch is None else training.selected_epoch
    return first <= last


def selected_too_early(config: Mapping[str, object], training: TrainingReport) -> tuple[str, ...]:
    """One sentence for each method or combination that began after the selected weights were trained."""
    selected = training.selected_epoch
    if selected is None:
        return ()
    own, base = str(config.get("method")), config.get("base_loss")
    sentences = []
    for name, (first, words) in _starts(config).items():
        if selected < first < training.num_train_epochs:
            what = f"mining ({name})" if "mining_start_epoch" in words else name
            plain = f", and these are weights of {base or 'plain adversarial training'} alone" if name == own else ""
            sentences.append(
                f"The weights were selected in epoch {selected + 1}, and {what} begins with {words}: it had no part "
                f"in them{plain}."
            )
    return tuple(sentences)


def papers(cited: Iterable[str], attacks: Iterable[str]) -> dict[str, str]:
    """Link and title of each paper, once: of the entries of ``CITATIONS`` called so, and of the attacks.

    ``attacks`` are names of evaluations, such as "pgd-20".
    """
    entries = [_ATTACKS[kind] for name in attacks if (kind := name.split("-")[0]) in _ATTACKS]
    return {PAPERS[name]: _TITLES[name] for name in (*cited, *entries)}


def option_text(name: str, value: object) -> str:
    """The value of a setting in words; where it counts epochs from 0, the epoch from 1 with the flag beside it."""
    if name.endswith("_epoch") and type(value) is int:
        return f"epoch {value + 1} (--{name} {value})"
    if name.endswith("_epochs") and isinstance(value, list) and all(type(item) is int for item in value):
        counted = ", ".join(str(item + 1) for item in value)
        return f"{'epoch' if len(value) == 1 else 'epochs'} {counted} (--{name} {' '.join(map(str, value))})"
    if name == "lr_drops" and isinstance(value, list):
        drops = [str(drop).partition(":") for drop in value]
        if all(epoch.isdecimal() for epoch, _, _ in drops):
            steps = ", ".join(f"× {factor} from epoch {int(epoch) + 1}" for epoch, _, factor in drops)
            return f"{steps} (--lr_drops {' '.join(map(str, value))})"
    return in_words(value)


def _starts(config: Mapping[str, object]) -> dict[str, tuple[int, str]]:
    """By name of method or combination: the 0-based epoch in which it begins, and the same in words."""
    method = trained_method(config)
    if method is None:
        return {}
    awp_start = config.get("awp_start_epoch") if config.get("awp_gamma") is not None else None
    return method.starts(awp_start if isinstance(awp_start, int) else None)


def cited_methods(config: Mapping[str, object]) -> list[str]:
    """Names in ``CITATIONS`` of the method, its base loss and its combinations, each once."""
    names = [config.get(setting) for setting in ("method", "base_loss", *LENDERS)]
    names.append("awp" if config.get("awp_gamma") is not None else None)
    names.append("cfa" if gates_averaging(config) else None)
    return [name for name in dict.fromkeys(map(str, names)) if name in CITATIONS]


def in_words(value: object) -> str:
    """The value of a setting in words and commas; in a mapping, beside what counts epochs from 0, the epoch from 1."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name}={in_words(entry)}"
            + (f" (epoch {entry + 1})" if name.endswith("_epoch") and type(entry) is int else "")
            for name, entry in value.items()
        )
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _described(name: str) -> str:
    """A method's name and summary; the name is not said twice."""
    kind = available().get(name)
    if kind is None:
        return name
    return kind.summary if kind.summary.lower().startswith(f"{name}:") else f"{name}: {kind.summary}"


def _is_set(value: object) -> bool:
    return value is not False and value not in (None, "none", [], {}, "")


def exchange_sentence(report: CalibrationReport) -> str:
    """Cost and gain of the shifts, in one sentence."""
    before, after = report.point(0.0), report.point(report.fairness)
    if report.fairness == 0:
        return "Fairness 0 leaves the model unchanged."
    lost = 100 * (before.average - after.average)
    averages = f"{percent(before.average)} % before, {percent(after.average)} % after"
    price = f"for {lost:.1f} points of the average" if lost >= 0 else f"and the average rose by {-lost:.1f} points"
    return (
        f"Fairness {report.fairness:g} took the worst class from {percent(before.worst_class)} % to "
        f"{percent(after.worst_class)} % and the worst 30 % of the classes from "
        f"{percent(before.worst_30_percent)} % to {percent(after.worst_30_percent)} %, {price} ({averages}), "
        "counted on images that the shifts were not found on."
    )


def training_images_note(report: CalibrationReport) -> str | None:
    """The warning that goes with shifts found on training images; None for others."""
    if not report.seen_in_training:
        return None
    return (
        f"The class shifts were found on images that the model was trained on ({report.images}): its accuracy on them "
        "is higher than on new images, and not equally so in every class, so the shifts may be wrong for new images, "
        "and the frontier is too optimistic."
    )


def gates_averaging(config: Mapping[str, object]) -> bool:
    """Whether weights were averaged, see `ham_hf.training.config.TrainingConfig`; never in older reports."""
    kind = available().get(str(config.get("method")))
    return config.get("fawa") == "on" or (config.get("fawa") == "auto" and kind is not None and kind.gates_averaging)
