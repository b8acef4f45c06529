"""Report -> model card: README.md from the template, with metadata that the Hub parses.

Whatever comes from a dataset or a user (class names, dataset names, settings) is data. A template expression must
print ``Markdown``, which only the filters here make; a plain string is an error, so nothing can go out unescaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, StrictUndefined, Template

from ham_hf.hub_ids import is_hub_id
from ham_hf.reporting.breakdown_tables import corrupted_class_rows, corruption_rows, each_group_rows, group_rows
from ham_hf.reporting.calibration import LOGIT_ADJUSTMENT, exchange_sentence, frontier_rows
from ham_hf.reporting.method_text import (
    citations,
    combined_with,
    method_began,
    method_rows,
    method_title,
    never_active,
    option_text,
    paper_links,
)
from ham_hf.reporting.report import AttackReport, RunReport, TrainingReport, percent, plain_text, results_table

TEMPLATE_NAME = "robust_classifier.md"
MAX_CLASS_ROWS = 200
SHOWN_CLASS_ROWS = 50
FIGURES = (
    ("Clean and robust accuracy per class", "figures/per_class_accuracy.png"),
    ("Training curves", "figures/training_curves.png"),
    ("What training did to each class", "figures/class_treatment.png"),
    ("What fairness costs, on held-out images", "figures/fairness_frontier.png"),
    ("Clean and adversarial images", "figures/adversarial_examples.png"),
)
IMAGES = ("figures/adversarial_examples.png",)
"""Files that show images of the dataset, which not everybody may see; see `without_images`."""
SHOWN_SHIFTS = 40
SELECTION_RULES = {
    "robust_accuracy": "the highest robust accuracy",
    "worst_class": "the highest robust accuracy of the worst class",
    "verdict": "the largest share of images that are right as they are and under both PGD and CW",
    "robust_plus_worst": "the highest sum of the average and the worst-class robust accuracy",
}
TRAINING_SETTINGS = (
    ("Pretrained weights", "pretrained"),
    ("Attack steps K", "num_steps"),
    ("Attack step size", "step_size"),
    ("Batch size per process", "per_device_train_batch_size"),
    ("Gradient accumulation steps", "gradient_accumulation_steps"),
    ("Optimizer", "optimizer"),
    ("Learning rate", "learning_rate"),
    ("Learning rate schedule", "lr_scheduler_type"),
    ("Learning rate drops", "lr_drops"),
    ("Weight decay", "weight_decay"),
    ("Mixed precision", "mixed_precision"),
    ("Precision of the attack in training", "attack_precision"),
)
MARKUP = re.compile(r"([\\`*_{}\[\]#|~$!@]|:(?=\S)|(?<=www)\.)", flags=re.IGNORECASE)
"""Characters that mean something to Markdown inside a line, and those that make a bare address a link."""


class Markdown(str):
    """Text that can go into a card as it is."""

    __slots__ = ()


def write_card(report: RunReport, folder: str | Path, *, repo_id: str | None, model_license: str) -> Path:
    """Write ``README.md`` into a run's output folder, replacing the one of an earlier evaluation.

    Args:
        report: what to write about.
        folder: output folder; figures that exist in its ``figures`` are shown.
        repo_id: "user/name" on the Hub for the loading line; None if it is not known, then the line loads the folder.
        model_license: license of the weights, a Hub license id such as "apache-2.0".

    Returns:
        The path of the card.

    Raises:
        ValueError: if ``repo_id`` cannot be the id of a repository, or the report has neither training nor
            calibration.
    """
    folder = Path(folder)
    if report.training is None and report.calibration is None:
        raise ValueError(
            "the card describes how the model was made, and this report says of no training or calibration"
        )
    context = _context(report, folder, repo_id=repo_id, model_license=model_license)
    if report.training is not None:
        context |= {
            "training_rows": _training_rows(report, report.training),
            "selection": _selection(report, report.training),
        }
    path = folder / "README.md"
    path.write_text(_template().render(context), encoding="utf-8")
    return path


def evaluation_section(report: RunReport) -> str:
    """The card's evaluation part alone (threat model, results, per-class table), as Markdown to paste elsewhere."""
    template = _template()
    context = _context(report, None, repo_id=None, model_license="")
    return "".join(template.blocks["evaluation"](template.new_context(context))).strip() + "\n"


def without_images(markdown: str) -> str:
    """A card without what shows images of the dataset, the files of ``IMAGES``."""
    return re.sub(rf"!\[[^\]\n]*\]\((?:{'|'.join(map(re.escape, IMAGES))})\)\n\n?", "", markdown)


def card_metadata(report: RunReport, *, repo_id: str | None, model_license: str) -> ModelCardData:
    """The card's YAML front matter, with one ``model-index`` entry per evaluation and metric."""
    method = report.config.get("method")
    dataset, base_model = report.dataset, report.model.base_model
    tags = [
        "timm",
        "image-classification",
        "adversarial-robustness",
        # How a stranger's model was trained is for its own card to say.
        *(["adversarial-training"] if report.training else []),
        "robust-fairness",
        "ham_hf",
        *([plain_text(method)] if method else []),
        "safetensors",
        *(["class-shifts", *map(plain_text, report.calibration.tags)] if report.calibration else []),
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(tags)),
        license=plain_text(model_license),
        datasets=[dataset.hub_id] if dataset.hub_id else None,
        base_model=base_model if is_hub_id(base_model or "", with_owner=True) else None,
        metrics=["accuracy"],
        model_name=_title(report, repo_id),
        eval_results=[entry for attack in report.entries() for entry in _eval_results(report, attack)],
    )


def text(value: object, max_length: int = 60) -> Markdown:
    """Escape ``value`` for running text and table cells: no markup, no HTML, no line breaks, no autolinks."""
    escaped = MARKUP.sub(r"\\\1", plain_text(value, max_length))
    return Markdown(escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def code(value: object) -> Markdown:
    """``value`` as a code span, for running text (not for tables, whose pipes code spans do not protect)."""
    return Markdown(f"`{verbatim(value)}`")


def verbatim(value: object) -> Markdown:
    """``value`` for the inside of a fenced code block."""
    return Markdown(plain_text(value).replace("`", "'"))


def literal(value: str | float) -> Markdown:
    """``value`` as a Python literal, for the inside of a fenced code block."""
    return Markdown(json.dumps(verbatim(value) if isinstance(value, str) else value, ensure_ascii=False))


def table(rows: Sequence[Mapping[str, str]]) -> Markdown:
    """Rows with equal keys as a Markdown table, every cell escaped."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    cells = ["| " + " | ".join(text(cell) for cell in line) + " |" for line in lines]
    alignment = "|---|" + "---:|" * (len(lines[0]) - 1)
    return Markdown("\n".join([cells[0], alignment, *cells[1:]]))


def fraction_text(value: float) -> str:
    """A length in pixel units the way the field writes it: "8/255" where it is that, else the number."""
    steps = value * 255
    return f"{round(steps)}/255" if steps > 0.5 and abs(steps - round(steps)) < 1e-6 else f"{value:g}"


def _template() -> Template:
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_only_markdown,
        autoescape=False,  # noqa: S701 (escaping is for Markdown, by the filters, enforced by ``finalize``)
    )
    environment.filters |= {
        "text": text,
        "code": code,
        "verbatim": verbatim,
        "literal": literal,
        "table": table,
        "percent": lambda share: Markdown(percent(share)),
        "thousands": lambda number: Markdown(f"{number:,}"),
        "number": lambda number: Markdown(f"{number:g}"),
        "interval": lambda ends: Markdown(" to ".join(map(percent, ends))),
        "numbers": lambda numbers: Markdown(", ".join(f"{number:.4g}" for number in numbers)),
    }
    return environment.from_string(_template_source())


def _template_source() -> str:
    """The template, from the installed package or, in a source tree, from ``model_cards`` beside the package."""
    candidates = (
        files("ham_hf") / "templates" / TEMPLATE_NAME,
        Path(__file__).resolve().parents[2] / "model_cards" / TEMPLATE_NAME,
    )
    for candidate in candidates:
        if candidate.is_file():
            return candidate.read_text(encoding="utf-8")
    raise FileNotFoundError(f"the card template {TEMPLATE_NAME} is missing from the installation: reinstall ham_hf")


def _only_markdown(value: object) -> object:
    if isinstance(value, (Markdown, int)):
        return value
    raise TypeError(f"the card template prints {value!r} unescaped: give it a filter")


def _context(report: RunReport, folder: Path | None, *, repo_id: str | None, model_license: str) -> dict[str, object]:
    if repo_id is not None:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise ValueError(f"the card's loading line needs the full repository id, user/name, got {repo_id}")
    metadata = card_metadata(report, repo_id=repo_id, model_license=model_license)
    reference = report.reference_attack()
    class_rows = _class_rows(report)
    shown = class_rows if len(class_rows) <= MAX_CLASS_ROWS else class_rows[:SHOWN_CLASS_ROWS]
    missing = next(iter(report.results.values())).summary.missing_classes
    ran = {attack.name.split("-")[0] for attack in report.results.values()}
    name = report.model.name
    norm = {"linf": "L-infinity", "l2": "L2"}.get(report.threat_model.norm, plain_text(report.threat_model.norm))
    return {
        "report": report,
        "metadata": Markdown(metadata.to_yaml()),
        "title": _title(report, repo_id),
        "dataset": _dataset_name(report),
        "original": report.model.base_model or plain_text(Path(report.model.name).name),
        "method": method_title(report.config),
        "method_began": _method_began(report),
        "combined_with": combined_with(report.config),
        "trained_as": name if re.fullmatch(r"[a-z0-9]+_cifar", name) and name != report.model.architecture else "",
        "papers": [Markdown(link) for link in paper_links(report.config)],
        "citations": [Markdown(entry) for entry in _citations(report)],
        "summary": reference.summary if reference else None,
        "attack_title": reference.title if reference else None,
        "threat_model": Markdown(f"{norm}, ε = {fraction_text(report.threat_model.epsilon)}"),
        "repo_id": repo_id,
        "space": bool(repo_id and report.config.get("hub_space")),
        "hub_source": Markdown(repo_id or "."),
        "source": Markdown(f"hf-hub:{repo_id}" if repo_id else "local-dir:."),
        "rgb_form": bool(folder) and (Path(str(folder)) / "rgb" / "config.json").is_file(),
        "image_mode": Markdown({1: "L", 3: "RGB", 4: "RGBA"}.get(report.model.in_chans, "RGB")),
        "rows": results_table(report, intervals=True),
        "verdict": report.verdict,
        "verdict_attacks": ", ".join(attack.title for attack in report.results.values() if attack.name != "clean"),
        "has_intervals": any(attack.intervals for attack in report.entries()),
        "class_rows": shown,
        "num_tested_classes": len(class_rows),
        "never_active": never_active(report.config, report.training.num_train_epochs) if report.training else "",
        "hidden_classes": len(class_rows) - len(shown),
        "group_rows": group_rows(report.groups) if report.groups else [],
        "each_group_rows": each_group_rows(report.groups) if report.groups else [],
        "corruption_rows": corruption_rows(report),
        "corrupted_class_rows": corrupted_class_rows(report),
        "figures": [(title, Markdown(path)) for title, path in FIGURES if folder and (folder / path).is_file()],
        "seeds": _seeds(report),
        "not_run": ", ".join(title for name, title in (("pgd", "PGD"), ("cw", "CW")) if name not in ran),
        "missing_classes": ", ".join(plain_text(report.dataset.class_names[index], 30) for index in missing),
        "model_license": model_license,
        **_calibration(report),
        "version": report.environment.versions.get("ham_hf", "unknown"),
    }


def _citations(report: RunReport) -> list[str]:
    """Entries for the method, if the model was trained here, and for class shifts, if it has them."""
    entries = [] if report.training is None and report.calibration is not None else list(citations(report.config))
    return [*entries, LOGIT_ADJUSTMENT] if report.calibration is not None else entries


def _calibration(report: RunReport) -> dict[str, object]:
    """What the card says of class shifts; nothing where there are none."""
    found = report.calibration
    if found is None:
        return {"calibration": None}
    names = report.dataset.class_names
    order = sorted(range(len(names)), key=lambda index: found.shifts[index])
    shown = order if len(order) <= SHOWN_SHIFTS else [*order[: SHOWN_SHIFTS // 2], *order[-SHOWN_SHIFTS // 2 :]]
    return {
        "calibration": found,
        "exchange": exchange_sentence(found),
        "frontier_rows": frontier_rows(found),
        "shifts": ", ".join(f"{plain_text(names[index], 30)} {found.shifts[index]:+.2f}" for index in shown),
        "hidden_shifts": len(order) - len(shown),
        "least_factor": Markdown(f"{min((f for f in found.factors if f), default=1.0):.2f}"),
    }


def _method_began(report: RunReport) -> bool:
    return report.training is None or method_began(report.config, report.training)


def _title(report: RunReport, repo_id: str | None) -> str:
    return repo_id.split("/")[-1] if repo_id else f"{plain_text(report.model.name)}, {_dataset_name(report)}"


def _dataset_name(report: RunReport) -> str:
    """The Hub id, or the last part of a local path: where it lies on this machine is nobody's business."""
    return report.dataset.hub_id or plain_text(Path(report.dataset.name).name)


def _class_rows(report: RunReport) -> list[dict[str, str]]:
    """One row per class with test images, the worst by the verdict (else under the reference attack) first."""
    order_by = report.verdict or report.reference_attack() or next(iter(report.results.values()))
    entries = order_by.summary.per_class
    present = [index for index, entry in enumerate(entries) if entry.count]
    present.sort(key=lambda index: entries[index].accuracy or 0.0)
    rows = []
    for index in present:
        row = {
            "Class": plain_text(report.dataset.class_names[index], 40),
            "Images": str(max(attack.summary.per_class[index].count for attack in report.results.values())),
        }
        for attack in report.entries():
            entry = attack.summary.per_class[index]
            row[attack.title] = "–"
            if entry.accuracy is not None and entry.low is not None and entry.high is not None:
                row[attack.title] = f"{percent(entry.accuracy)} ({percent(entry.low)}–{percent(entry.high)})"
        rows.append(row)
    return rows


def _training_rows(report: RunReport, training: TrainingReport) -> list[tuple[str, str]]:
    rows = method_rows(report.config, averaged=report.passed_gate())
    for label, key in TRAINING_SETTINGS:
        value = report.config.get(key)
        if key == "lr_drops" and report.config.get("lr_scheduler_type", "piecewise") != "piecewise":
            continue
        if key == "step_size" and isinstance(value, float):
            value = fraction_text(value)
        if value not in (None, []):
            rows.append((label, option_text(key, value)))
    environment = report.environment
    versions = environment.versions
    skipped = f" ({training.skipped_updates} skipped for want of a hard example)" if training.skipped_updates else ""
    return [
        *rows,
        ("Epochs", str(training.num_train_epochs)),
        ("Optimizer steps", f"{training.steps}{skipped}"),
        ("Seeds", _seeds(report)),
        ("Training images", f"{report.dataset.num_train} (augmentation: {report.dataset.augmentation})"),
        *_trained_on(report),
        ("Duration", f"{training.seconds / 60:.1f} minutes"),
        *([] if training.passes is None else [("Computation", _passes(training.passes, report.dataset.num_train))]),
        ("Hardware", f"{environment.num_processes} × {environment.device}"),
        ("Software", ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions)),
    ]


def _passes(passes: float, num_images: int) -> str:
    """Computation of a run: a forward counts 1, a gradient of the input 2, a training pass 3."""
    return f"{passes / num_images:.0f} forward passes per training image, validation included"


def _trained_on(report: RunReport) -> list[tuple[str, str]]:
    """Split, revision and fingerprint of the training images."""
    record = report.dataset.trained_on
    if record is None:
        return []
    revision = f", revision {record['revision']}" if record.get("revision") else ""
    labels = f"labels SHA-256 {str(record['fingerprint'])[:16]}" if record.get("fingerprint") else "labels not known"
    return [
        (
            "Taken from",
            f"split {record.get('train_split')} of {record.get('dataset')}{revision}: {record.get('num_images')} "
            f"images, {labels}",
        )
    ]


def _seeds(report: RunReport) -> str:
    return ", ".join(f"{name} {seed}" for name, seed in report.seeds.items())


def _selection(report: RunReport, training: TrainingReport) -> Markdown:
    """One sentence on how the weights were selected."""
    if training.selection_metric == "last":
        return Markdown("The weights are those after the last step.")
    rule = SELECTION_RULES.get(training.selection_metric, text(training.selection_metric))
    which = "" if training.selected_epoch is None else f" of epoch {training.selected_epoch + 1}"
    return Markdown(
        f"The weights are those{which} with {rule} on {report.dataset.num_validation} images held out of the training "
        "images."
    )


def _test_split(origin: str) -> str:
    """Name of the split that the test images are from, also if they were held out of it."""
    held_out = re.match(r"held out of (.+) \([\d.]+ %, stratified, seed \d+\)$", origin)
    return plain_text(held_out[1] if held_out else origin)


def _eval_results(report: RunReport, attack: AttackReport) -> list[EvalResult]:
    """Average, worst class and gap of one evaluation as ``model-index`` entries, values in [0, 1]."""
    summary, dataset = attack.summary, report.dataset
    label = "Clean accuracy" if attack.name == "clean" else f"Robust accuracy ({attack.title})"
    name = _dataset_name(report)
    shared: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": dataset.hub_id or (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "local"),
        "dataset_name": name,
        "dataset_config": plain_text(dataset.config_name) if dataset.config_name else None,
        "dataset_split": _test_split(dataset.test_split_origin),
        "dataset_revision": plain_text(dataset.revision) if dataset.revision else None,
        "metric_args": {"attack": attack.name, **attack.settings, "num_examples": summary.num_examples},
    }
    metrics = (
        ("accuracy", label, summary.average),
        ("worst_class_accuracy", f"{label}, worst class", summary.worst_class),
        ("class_accuracy_gap", f"{label}, gap between best and worst class", summary.gap),
    )
    return [
        EvalResult(metric_type=metric, metric_name=title, metric_value=round(value, 6), **shared)
        for metric, title, value in metrics
    ]
