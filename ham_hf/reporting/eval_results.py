"""Results of a report in the two forms that the Hub reads: ``model-index`` in the card, and ``.eval_results/*.yaml``.

Model pages and leaderboards of benchmarks show the second form. It names a dataset of the Hub, so results on local
images are in the card alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from ham_hf.artifacts import EVAL_RESULTS
from ham_hf.files import atomic_write
from ham_hf.reporting.formats import fraction_text, plain_text
from ham_hf.reporting.report import RunReport


def model_index(report: RunReport) -> list[EvalResult]:
    """Average, worst class and gap of each evaluation, values in [0, 1]."""
    dataset, found = report.dataset, list[EvalResult]()
    local = re.sub(r"[^a-z0-9]+", "-", dataset.title.lower()).strip("-")
    for attack in report.entries():
        summary = attack.summary
        label = "Clean accuracy" if attack.name == "clean" else f"Robust accuracy ({attack.title})"
        metrics = (
            ("accuracy", label, summary.average),
            ("worst_class_accuracy", f"{label}, worst class", summary.worst_class),
            ("class_accuracy_gap", f"{label}, gap between best and worst class", summary.gap),
        )
        found += [
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=dataset.hub_id or local or "local",
                dataset_name=dataset.title,
                dataset_config=plain_text(dataset.config_name) if dataset.config_name else None,
                dataset_split=plain_text(dataset.test_split_origin),
                dataset_revision=plain_text(dataset.revision) if dataset.revision else None,
                metric_type=metric,
                metric_name=title,
                metric_value=round(value, 6),
                metric_args={"attack": attack.name, **attack.settings, "num_examples": summary.num_examples},
            )
            for metric, title, value in metrics
        ]
    return found


def eval_results(report: RunReport) -> list[EvalResultEntry]:
    """Average and worst class of each evaluation, values in [0, 1]; nothing where the dataset is not on the Hub.

    Tasks are called by evaluation and metric, such as ``autoattack`` and ``autoattack_worst_class``; the threat model,
    the images and the worst class are in the notes. No dataset of the Hub defines such tasks yet: the names are ours.
    """
    dataset = report.dataset
    if dataset.hub_id is None:
        return []
    threat = f"{report.threat_model.norm}, epsilon {fraction_text(report.threat_model.epsilon)}"
    revision = dataset.revision if re.fullmatch(r"[0-9a-f]{40}", dataset.revision or "") else None
    entries = []
    for attack in report.entries():
        summary = attack.summary
        images = f"{summary.num_examples} of {dataset.num_test} test images"
        notes = images if attack.name == "clean" else f"{threat}; {images}"
        worst = plain_text(dataset.class_names[summary.worst_class_index], 60)
        for task, value, of in (
            (attack.name, summary.average, notes),
            (f"{attack.name}_worst_class", summary.worst_class, f"{notes}; class {worst}"),
        ):
            entries.append(
                EvalResultEntry(
                    dataset_id=dataset.hub_id,
                    task_id=task,
                    value=round(value, 6),
                    dataset_revision=revision,
                    date=report.created,
                    notes=f"{of}; measured by ham_hf",
                )
            )
    return entries


def write_eval_results(report: RunReport, folder: str | Path, *, suffix: str = "") -> Path | None:
    """Write ``.eval_results/OWNER-NAME.yaml``, called by the dataset, into ``folder``; None where there is nothing.

    ``suffix`` is appended to the name, so that an evaluation does not replace the results of the training run.
    """
    entries = eval_results(report)
    if not entries:
        return None
    name = re.sub(r"[^A-Za-z0-9._]+", "-", str(report.dataset.hub_id)) + suffix
    path = Path(folder) / EVAL_RESULTS / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
    return path
