"""What is known of runs beside their numbers, as text: settings, budget, environment; and in what they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from ham_hf.config.yaml_text import exact_fraction
from ham_hf.report import RunReport, plain_text

NOT_THE_RUN = frozenset(
    {
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "logging_steps",
        "save_steps", "save_total_limit", "dataloader_num_workers", "push_to_hub", "hub_model_id",
        "hub_private_repo", "hub_revision", "hub_strategy", "model_license",
    }
)  # fmt: skip
"""Settings that change where a run leaves things and how it is shown, and none of its numbers."""
NOT_THE_BUDGET = frozenset({"seed", "num_examples", "subset"})
"""Settings of an evaluation that differ between seeds, or are said already."""

Facts: TypeAlias = dict[str, dict[str, tuple[str, ...]]]
"""By title: each value that a run has, with the labels of the rows that have it."""


def run_settings(config: Mapping[str, object], *, without: Collection[str] = ()) -> dict[str, object]:
    """The settings that decide a run's numbers, as JSON gives them back: two runs with equal ones are repetitions."""
    plain: dict[str, object] = json.loads(json.dumps(dict(config)))
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
    if isinstance(value, str):
        return plain_text(value)
    return plain_text(exact_fraction(value) or json.dumps(value, ensure_ascii=False), 200)


def facts_of(of_runs: Sequence[tuple[str, Mapping[str, str]]]) -> Facts:
    """Values by title, each with the labels of the rows that have it; what a run does not know is left out."""
    found: dict[str, dict[str, list[str]]] = {}
    for label, facts in of_runs:
        for title, value in facts.items():
            labels = found.setdefault(title, {}).setdefault(value, [])
            if label not in labels:
                labels.append(label)
    return {title: {value: tuple(labels) for value, labels in values.items()} for title, values in found.items()}


def budget(report: RunReport) -> dict[str, str]:
    """What has to be equal for numbers to be comparable; of a model that was only evaluated less is known."""
    dataset, model, config, training = report.dataset, report.model, report.config, report.training
    facts = {
        "Dataset": " ".join(filter(None, (dataset.name, dataset.config_name, dataset.revision))),
        "Test images": f"{dataset.num_test}, {dataset.test_split_origin}",
        "Model": f"{model.architecture}, {model.num_parameters:,} parameters, images of {model.image_size} px",
        "Threat model": f"{report.threat_model.norm}, epsilon {setting_text(report.threat_model.epsilon)}",
    }
    if training is not None:
        per_process = config.get("per_device_train_batch_size"), config.get("gradient_accumulation_steps", 1)
        processes = report.environment.num_processes
        size = math.prod(n for n in (*per_process, processes) if isinstance(n, int))
        facts |= {
            "Weights at the start": model.base_model or "random",
            "Training images": f"{dataset.num_train}, held out {dataset.num_validation}",
            "Augmentation": dataset.augmentation,
            "Training": f"{training.num_train_epochs} epochs, {training.steps} updates of {size} images",
            "Training attack": f"{setting_text(config.get('num_steps'))} steps of "
            f"{setting_text(config.get('step_size'))}",
            "Selection": training.selection_metric,
        }
    facts["Evaluations"] = ", ".join(attack.title for attack in report.results.values())
    for attack in report.results.values():
        shown = {key: value for key, value in attack.settings.items() if key not in NOT_THE_BUDGET}
        settings = [f"{key} {setting_text(value)}" for key, value in shown.items()]
        facts[attack.title] = ", ".join([f"{attack.summary.num_examples} images", *settings])
    return facts


def environment(report: RunReport) -> dict[str, str]:
    """Hardware and software by title; seconds and memory are comparable only where the hardware is the same."""
    found = report.environment
    return {
        "Device": f"{found.device}, {found.num_processes} process(es) of {found.num_threads} thread(s)",
        "Software": ", ".join(
            [f"Python {found.python}", *(f"{name} {version}" for name, version in found.versions.items())]
        ),
        "Commit": found.commit or "unknown",
    }
