"""Settings, budget and environment of runs as text, and how they differ."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from ham_hf.config import TrainConfig, config_to_dict
from ham_hf.config.assembly import group_settings
from ham_hf.config.yaml_file import exact_fraction
from ham_hf.hub_config import EvaluationHubConfig, HubConfig
from ham_hf.methods import Method, available
from ham_hf.reporting.formats import plain_text, public_value, public_word
from ham_hf.reporting.method_text import gates_averaging
from ham_hf.reporting.report import AttackReport, RunReport
from ham_hf.settings import settings_of
from ham_hf.training.config import CHANGES_NO_NUMBER

_PUSHED = {known.name for kind in (HubConfig, EvaluationHubConfig) for known in settings_of(kind)}
NOT_THE_RUN = CHANGES_NO_NUMBER | _PUSHED | {"dataloader_num_workers"}
"""Settings that change no number of a run."""
_OF_ONE_UPDATE = ("per_device_train_batch_size", "gradient_accumulation_steps")
NOT_THE_BUDGET = frozenset({"seed", "num_examples", "subset"})
"""Settings of an evaluation that differ between seeds or are shown elsewhere."""
IMAGES = "Images of each class"
"""The only one of the `conditions` in which two runs may differ and still be compared on the images that both saw."""

ByValue: TypeAlias = dict[str, dict[str, tuple[str, ...]]]
"""By title: each value that a run has, with the labels of the rows that have it."""


def run_settings(config: Mapping[str, object], *, without: Collection[str] = ()) -> dict[str, object]:
    """Return the settings that decide a run's numbers, as JSON values: runs with equal ones are repetitions.

    Reports written before a setting existed get its default, which reproduces the old behavior (where it does not,
    the report knows: `RunReport`). Options of borrowed class rules count one by one. Batch size and accumulation
    count by their product, as a run may be resumed with another pair.
    """
    plain: dict[str, object] = json.loads(json.dumps(dict(config)))
    if isinstance(plain.get("method"), str):
        plain = json.loads(_defaults(str(plain["method"]))) | plain
    options = plain.pop("class_rule_args", {})
    plain = (options if isinstance(options, dict) else {"class_rule_args": options}) | plain
    batch, accumulation = (plain.get(name) for name in _OF_ONE_UPDATE)
    if isinstance(batch, int) and isinstance(accumulation, int):
        plain = {name: value for name, value in plain.items() if name not in _OF_ONE_UPDATE}
        plain["images_per_update_and_process"] = batch * accumulation
    return {name: value for name, value in plain.items() if name not in NOT_THE_RUN and name not in without}


def differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """Every setting that differs, as ``name A -> B``; "(none)" stands for a setting that is not there."""
    return [
        f"{name} {setting_text(theirs.get(name, '(none)'))} -> {setting_text(ours.get(name, '(none)'))}"
        for name in sorted({*ours, *theirs})
        if name not in ours or name not in theirs or ours[name] != theirs[name]
    ]


def setting_text(value: object) -> str:
    """The value of a setting in one line, as a recipe would have it."""
    value = public_value(value)
    if isinstance(value, str):
        return plain_text(value)
    return plain_text(exact_fraction(value) or json.dumps(value, ensure_ascii=False), 200)


@functools.cache
def _defaults(method: str) -> str:
    """Every setting's default as JSON; the options of a method that is not installed are unknown."""
    everything = config_to_dict(TrainConfig())
    values = {one.name: everything[one.name] for group in group_settings(TrainConfig).values() for one in group}
    values |= {one.name: one.default for one in settings_of(available().get(method, Method))}
    return json.dumps(values)


def by_value(of_runs: Sequence[tuple[str, Mapping[str, str]]]) -> ByValue:
    """Values by title, each with the labels of the rows that have it; what a run does not know is left out."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for label, values in of_runs:
        for title, value in values.items():
            found.setdefault(title, {}).setdefault(value, {})[label] = None
    return {title: {value: tuple(labels) for value, labels in values.items()} for title, values in found.items()}


def budget(report: RunReport) -> dict[str, str]:
    """Values by title that must be equal for numbers to be comparable; fewer of a model that was only evaluated."""
    dataset, model, config, training = report.dataset, report.model, report.config, report.training
    # Local paths are not published, as in the model card.
    name = dataset.hub_id or dataset.name.rstrip("/").rpartition("/")[2]
    facts = {
        "Dataset": " ".join(filter(None, (name, dataset.config_name, dataset.revision))),
        "Test images": f"{dataset.num_test}, {dataset.test_split_origin}",
        "Model": f"{model.architecture}, {model.num_parameters:,} parameters, images of {model.image_size} px",
        "Threat model": f"{report.threat_model.norm}, epsilon {setting_text(report.threat_model.epsilon)}",
    }
    if training is not None:
        per_process = (config.get(name, 1) for name in _OF_ONE_UPDATE)
        processes = report.environment.num_processes
        size = math.prod(n for n in (*per_process, processes) if isinstance(n, int))
        facts |= {
            "Weights at the start": public_word(model.base_model or "random"),
            "Training images": f"{dataset.num_train}, held out {dataset.num_validation}",
            "Augmentation": dataset.augmentation,
            "Training": f"{training.num_train_epochs} epochs, {training.steps} updates of {size} images",
            "Training attack": f"{setting_text(config.get('num_steps'))} steps of "
            f"{setting_text(config.get('step_size'))}",
            "Optimizer": _optimizer(run_settings(config)),
            "Weight averaging": _averaging(report),
            "Selection": training.selection_metric,
        }
    facts["Evaluations"] = ", ".join(attack.title for attack in report.results.values())
    for attack in report.results.values():
        facts[attack.title] = ", ".join([f"{attack.summary.num_examples} images", *_attack_settings(attack)])
    return facts


def conditions(report: RunReport, attack: str) -> dict[str, str]:
    """Values that must be equal to compare one evaluation's numbers, by title.

    Images, threat model, and the settings of the attack; of the verdict, those of all attacks.
    """
    facts, result = budget(report), evaluations(report)[attack]
    counts = ", ".join(str(entry.count) for entry in result.summary.per_class)
    shared = {title: facts[title] for title in ("Dataset", "Test images", "Threat model")}
    of = [one for one in report.results.values() if attack == "verdict"] or [result]
    attacks = {one.title: ", ".join(sorted(_attack_settings(one))) for one in of if one.name != "clean"}
    return {**shared, IMAGES: counts, **attacks}


def evaluations(report: RunReport) -> dict[str, AttackReport]:
    """The verdict, where there is one, and every evaluation, by name."""
    return {**({} if report.verdict is None else {"verdict": report.verdict}), **report.results}


def _attack_settings(attack: AttackReport) -> list[str]:
    return [f"{key} {setting_text(value)}" for key, value in attack.settings.items() if key not in NOT_THE_BUDGET]


def _averaging(report: RunReport) -> str:
    """How the evaluated weights were averaged: a method may average where another one does not."""
    config = report.config
    if gates_averaging(config):
        if not report.passed_gate():
            return "none (no epoch passed the gate)"
        return f"fairness-gated per epoch, decay {setting_text(config.get('fawa_decay'))}"
    if config.get("ema_decay") is not None:
        return f"per update, decay {setting_text(config['ema_decay'])}"
    return "none"


def _optimizer(settings: Mapping[str, object]) -> str:
    schedule = [setting_text(settings.get("lr_scheduler_type"))]
    drops = settings.get("lr_drops")
    if schedule == ["piecewise"] and isinstance(drops, list):
        schedule.append(" ".join(map(str, drops)))
    return ", ".join(
        [
            setting_text(settings.get("optimizer")),
            f"learning rate {setting_text(settings.get('learning_rate'))}",
            f"{' '.join(schedule)} by {setting_text(settings.get('lr_step_unit'))}",
            f"weight decay {setting_text(settings.get('weight_decay'))}",
            f"precision {setting_text(settings.get('mixed_precision'))}",
            # Older reports do not have it: attacks ran in the precision of training.
            f"of attacks in training {setting_text(settings.get('attack_precision', 'training'))}",
        ]
    )


def machine_of(report: RunReport) -> dict[str, str]:
    """Hardware and software by title; seconds and memory are comparable only where the hardware is the same."""
    found = report.environment
    return {
        "Device": f"{found.device}, {found.num_processes} process(es) of {found.num_threads} thread(s)",
        "Software": ", ".join(
            [f"Python {found.python}", *(f"{name} {version}" for name, version in found.versions.items())]
        ),
        "Commit": found.commit or "unknown",
    }
