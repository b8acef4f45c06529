"""Report -> model card: README.md from the template, with metadata that the Hub parses.

Whatever comes from a dataset or a user (class names, dataset names, settings) is data. A template expression must
print ``Markdown``, which only the filters here make; a plain string is an error, so nothing can go out unescaped.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from ham_hf.artifacts import CARD_NAME, CONFIG_NAME
from ham_hf.data.provenance import plain_name
from ham_hf.files import atomic_write
from ham_hf.hub_config import HUB, is_hub_id, split_revision
from ham_hf.reporting.eval_results import model_index
from ham_hf.reporting.formats import (
    Markdown,
    code,
    fraction_text,
    literal,
    markdown_table,
    markdown_text,
    norm_text,
    percent,
    plain_text,
    verbatim,
)
from ham_hf.reporting.method_text import (
    CITATIONS,
    cited_methods,
    combined_with,
    exchange_sentence,
    method_began,
    method_rows,
    method_title,
    never_active,
    option_text,
    papers,
)
from ham_hf.reporting.report import RunReport, TrainingReport
from ham_hf.reporting.tables import (
    class_rows,
    corrupted_class_rows,
    corruption_rows,
    each_group_rows,
    frontier_rows,
    group_rows,
    results_table,
)

TEMPLATE_NAME = "robust_classifier.md"
MAX_CLASS_ROWS = 200
SHOWN_CLASS_ROWS = 50
OTHER_FIGURES = (
    ("What fairness costs, on held-out images", "figures/fairness_frontier.png"),
    ("What training did to each class", "figures/class_treatment.png"),
    ("Training curves", "figures/training_curves.png"),
)
IMAGES = ("figures/adversarial_examples.png", "image.png")
"""Files that show images of the dataset, which may be private; see `without_images`."""
_IMAGES_BEGIN, _IMAGES_END = "<!-- images of the dataset -->", "<!-- end of the images -->"
SHOWN_SHIFTS = 40
SELECTION_RULES = {
    "robust_accuracy": "the highest robust accuracy",
    "worst_class": "the highest robust accuracy of the worst class",
    "verdict": "the largest share of images that are right when clean and under both PGD and CW",
    "robust_plus_worst": "the highest sum of the average and the worst-class robust accuracy",
}
TRAINING_SETTINGS = (
    ("Model arguments", "model_args"),
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


def write_card(report: RunReport, folder: str | Path, *, repo_id: str | None, model_license: str) -> Path:
    """Write ``README.md`` into a run's output folder, replacing the one of an earlier evaluation; return its path.

    Figures that exist in the folder's ``figures`` are shown. ``repo_id`` is "user/name" on the Hub for the loading
    line, which loads the folder without it; ``model_license`` a Hub license id such as "apache-2.0".

    Raises:
        ValueError: if ``repo_id`` cannot be the id of a repository, or the report has neither training nor
            calibration.
    """
    folder = Path(folder)
    if report.training is None and report.calibration is None:
        raise ValueError("the card describes how the model was made, and this report has no training or calibration")
    context = _context(report, folder, repo_id=repo_id, model_license=model_license)
    if report.training is not None:
        context |= {
            "training_rows": _training_rows(report, report.training),
            "selection": _selection(report, report.training),
        }
    path = folder / CARD_NAME
    atomic_write(path, _template(_template_source()).render(context))
    return path


def evaluation_section(report: RunReport, folder: Path | None = None) -> str:
    """The card's evaluation part alone (threat model, results, per-class table, figures that exist in ``folder``)."""
    template = _template(_template_source())
    context = _context(report, folder, repo_id=None, model_license="")
    return "".join(template.blocks["evaluation"](template.new_context(context))).strip() + "\n"


def evaluation_document(report: RunReport, folder: str | Path, *, command: str) -> str:
    """``EVALUATION.md`` of a model that exists: which one, its headline, how it was measured, and the evaluation.

    Figures are looked for in ``folder``; ``command`` are the words that measure it again.
    """
    version = report.environment.versions.get("ham_hf", "unknown")
    opening = (
        f"# Robustness of {markdown_text(_model_name(report), 120)} on {markdown_text(report.dataset.title)}\n\n"
        f"**{_headline(report)}**\n\n"
        f"Model {_hub_link(_model_name(report))}, architecture {code(report.model.architecture)}, measured on "
        f"{_dataset_link(report)} by ham_hf {code(version)} on {code(report.created)}:\n\n"
        f"```bash\n{verbatim(command, 1000)}\n```\n\n"
    )
    return opening + evaluation_section(report, Path(folder))


def without_images(markdown: str) -> str:
    """A card or ``EVALUATION.md`` without what shows images of the dataset, the files of ``IMAGES``."""
    return re.sub(rf"{_IMAGES_BEGIN}\n.*?{_IMAGES_END}\n\n?", "", markdown, flags=re.DOTALL)


def card_metadata(report: RunReport, *, repo_id: str | None, model_license: str) -> ModelCardData:
    """The card's YAML front matter, with one ``model-index`` entry per evaluation and metric."""
    method = report.config.get("method")
    dataset, base_model = report.dataset, report.model.base_model
    tags = [
        "timm",
        "image-classification",
        "adversarial-robustness",
        # How a model from elsewhere was trained is a matter for its own card.
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
        model_name=repo_id.split("/")[-1] if repo_id else f"{plain_text(report.model.name)}, {report.dataset.title}",
        eval_results=model_index(report),
    )


@functools.cache
def _template(source: str) -> Template:
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_only_markdown,
        autoescape=False,  # noqa: S701 (escaping is for Markdown, by the filters, enforced by ``finalize``)
    )
    environment.filters |= {
        "text": markdown_text,
        "code": code,
        "verbatim": verbatim,
        "literal": literal,
        "table": markdown_table,
        "percent": lambda share: Markdown(percent(share)),
        "thousands": lambda number: Markdown(f"{number:,}"),
        "number": lambda number: Markdown(f"{number:g}"),
        "interval": lambda ends: Markdown(" to ".join(map(percent, ends))),
        "numbers": lambda numbers: Markdown(", ".join(f"{number:.4g}" for number in numbers)),
    }
    return environment.from_string(source)


def _template_source() -> str:
    """The template, from the installed package or, in a source tree, from ``model_cards`` beside the package."""
    for folder in (files("ham_hf") / "templates", Path(__file__).resolve().parents[2] / "model_cards"):
        if (folder / TEMPLATE_NAME).is_file():
            return (folder / TEMPLATE_NAME).read_text(encoding="utf-8")
    raise FileNotFoundError(f"the card template {TEMPLATE_NAME} is missing from the installation: reinstall ham_hf")


def _only_markdown(value: object) -> object:
    if isinstance(value, (Markdown, int)):
        return value
    raise TypeError(f"the card template prints {value!r} unescaped: give it a filter")


def _context(report: RunReport, folder: Path | None, *, repo_id: str | None, model_license: str) -> dict[str, object]:
    if repo_id is not None and not is_hub_id(repo_id, with_owner=True):
        raise ValueError(f"the card's loading line needs the full repository id, owner/name, got {repo_id!r}")
    metadata = card_metadata(report, repo_id=repo_id, model_license=model_license)
    reference = report.reference_attack()
    classes = class_rows(report)
    shown = classes if len(classes) <= MAX_CLASS_ROWS else classes[:SHOWN_CLASS_ROWS]
    missing = next(iter(report.results.values())).summary.missing_classes
    ran = {attack.name.split("-")[0] for attack in report.results.values()}
    name = report.model.name
    norm, epsilon = norm_text(report.threat_model.norm), fraction_text(report.threat_model.epsilon)
    cited = [] if report.training is None and report.calibration is not None else cited_methods(report.config)
    cited += [] if report.calibration is None else ["logit_adjustment"]
    return {
        "report": report,
        "metadata": Markdown(metadata.to_yaml()),
        "title": _title(report),
        "headline": _headline(report),
        "dataset_link": _dataset_link(report),
        "original": _hub_link(report.model.base_model or _model_name(report)),
        "started_from": _hub_link(report.model.base_model) if report.training and report.model.base_model else "",
        "method": method_title(report.config),
        "method_began": report.training is None or method_began(report.config, report.training),
        "combined_with": combined_with(report.config),
        "trained_as": name if re.fullmatch(r"[a-z0-9]+_cifar", name) and name != report.model.architecture else "",
        "papers": [
            Markdown(f"[{markdown_text(title, 150)}]({link})") for link, title in papers(cited, report.results).items()
        ],
        "citations": [Markdown(CITATIONS[name]) for name in cited],
        "summary": reference.summary if reference else None,
        "attack_title": reference.title if reference else None,
        "threat_model": Markdown(f"{norm}, ε = {epsilon}"),
        "repo_id": repo_id,
        "space": bool(repo_id and report.config.get("hub_space")),
        "hub_source": Markdown(repo_id or "."),
        "source": Markdown(f"hf-hub:{repo_id}" if repo_id else "local-dir:."),
        "rgb_form": bool(folder) and (Path(str(folder)) / "rgb" / CONFIG_NAME).is_file(),
        "image_mode": Markdown({1: "L", 3: "RGB", 4: "RGBA"}.get(report.model.in_chans, "RGB")),
        "rows": results_table(report, intervals=True),
        "verdict": report.verdict,
        "verdict_attacks": ", ".join(attack.title for attack in report.results.values() if attack.name != "clean"),
        "has_intervals": any(attack.intervals for attack in report.entries()),
        "class_rows": shown,
        "has_parts": any(map(report.is_subset, report.entries())),
        "num_tested_classes": sum(bool(one.count) for one in report.ordering_entry().summary.per_class),
        "never_active": never_active(report.config, report.training.num_train_epochs) if report.training else "",
        "hidden_classes": len(classes) - len(shown),
        "figures": [(title, Markdown(path)) for title, path in _figures(report) if _is_there(folder, path)],
        "example_figure": _is_there(folder, IMAGES[0]),
        "example_image": _is_there(folder, IMAGES[1]),
        "images_begin": Markdown(_IMAGES_BEGIN),
        "images_end": Markdown(_IMAGES_END),
        "group_rows": group_rows(report.groups) if report.groups else [],
        "each_group_rows": each_group_rows(report.groups) if report.groups else [],
        "corruption_rows": corruption_rows(report),
        "corrupted_class_rows": corrupted_class_rows(report),
        "seeds": _seeds(report),
        "not_run": ", ".join(title for name, title in (("pgd", "PGD"), ("cw", "CW")) if name not in ran),
        "missing_classes": ", ".join(plain_text(report.dataset.class_names[index], 30) for index in missing),
        "model_license": model_license,
        **_calibration(report),
        "version": report.environment.versions.get("ham_hf", "unknown"),
    }


def _calibration(report: RunReport) -> dict[str, object]:
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


def _model_name(report: RunReport) -> str:
    """The model as the user named it, without the path of a local folder."""
    name = plain_name(report.model.name.removeprefix("local-dir:"))
    hub = split_revision(name)
    return hub[0] if hub else plain_text(Path(name).name)


def _title(report: RunReport) -> str:
    if report.training is None:
        return f"{_model_name(report)}, calibrated on {report.dataset.title}"
    return f"{_model_name(report)}, trained on {report.dataset.title} with {report.config.get('method', 'unknown')}"


def _headline(report: RunReport) -> Markdown:
    """The numbers that matter: robust accuracy, its worst class, clean accuracy, each with its number of images."""
    robust, clean = report.verdict or report.reference_attack(), report.results.get("clean")
    parts = []
    if robust is not None:
        worst = markdown_text(report.dataset.class_names[robust.summary.worst_class_index], 40)
        parts.append(f"Robust accuracy {percent(robust.summary.average)} % of {robust.summary.num_examples:,} images")
        parts.append(f"worst class {percent(robust.summary.worst_class)} % ({worst})")
    if clean is not None:
        title, seen = "clean" if parts else "Clean", clean.summary.num_examples
        parts.append(f"{title} accuracy {percent(clean.summary.average)} % of {seen:,} images")
    return Markdown(" · ".join(parts))


def _hub_link(name: str) -> Markdown:
    """The name of a model as code, and as a link where it can be one on the Hub."""
    shown = code(name)
    return Markdown(f"[{shown}]({HUB}/{name})") if is_hub_id(name, with_owner=True) else shown


def _dataset_link(report: RunReport) -> Markdown:
    shown, hub_id = code(report.dataset.title), report.dataset.hub_id
    return Markdown(f"[{shown}]({HUB}/datasets/{hub_id})") if is_hub_id(hub_id or "") else shown


def _figures(report: RunReport) -> list[tuple[str, str]]:
    """Title and path of the figures, in the order of the card."""
    figures = [("Clean and robust accuracy per class", "figures/per_class_accuracy.png")]
    if attack := report.reference_attack():
        figures.append((f"Confusion under {attack.title}", f"figures/confusion_{attack.name}.png"))
    return [*figures, *OTHER_FIGURES]


def _is_there(folder: Path | None, path: str) -> bool:
    return folder is not None and (folder / path).is_file()


def _training_rows(report: RunReport, training: TrainingReport) -> list[tuple[str, str]]:
    rows = method_rows(report.config, averaged=report.passed_gate())
    for label, key in TRAINING_SETTINGS:
        value = report.config.get(key)
        if key == "lr_drops" and report.config.get("lr_scheduler_type", "piecewise") != "piecewise":
            continue
        if key == "step_size" and isinstance(value, float):
            value = fraction_text(value)
        if value not in (None, [], {}):
            rows.append((label, option_text(key, value)))
    environment, versions = report.environment, report.environment.versions
    skipped = f" ({training.skipped_updates} skipped for want of a hard example)" if training.skipped_updates else ""
    computation = []
    if training.passes is not None:
        passes = f"the cost of {training.passes / report.dataset.num_train:.0f} forward passes per training image"
        included = "validation and calibration" if report.calibration else "validation"
        counted = f"forward 1, gradient of the input 2, training pass 3; {included} included"
        computation.append(("Computation", f"{passes} ({counted})"))
    return [
        *rows,
        ("Epochs", str(training.num_train_epochs)),
        ("Optimizer steps", f"{training.steps}{skipped}"),
        ("Seeds", _seeds(report)),
        ("Training images", f"{report.dataset.num_train} (augmentation: {report.dataset.augmentation})"),
        *_trained_on(report),
        ("Duration", f"{training.seconds / 60:.1f} minutes"),
        *computation,
        ("Hardware", f"{environment.num_processes} × {environment.device}"),
        ("Software", ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions)),
    ]


def _trained_on(report: RunReport) -> list[tuple[str, str]]:
    record = report.dataset.trained_on
    if record is None:
        return []
    revision = f", revision {record['revision']}" if record.get("revision") else ""
    labels = f"labels SHA-256 {str(record['fingerprint'])[:16]}" if record.get("fingerprint") else "labels not known"
    split = f"split {record.get('train_split')} of {record.get('dataset')}{revision}"
    return [("Taken from", f"{split}: {record.get('num_images')} images, {labels}")]


def _seeds(report: RunReport) -> str:
    return ", ".join(f"{name} {seed}" for name, seed in report.seeds.items())


def _selection(report: RunReport, training: TrainingReport) -> Markdown:
    if training.selection_metric == "last":
        return Markdown("The weights are those after the last step.")
    rule = SELECTION_RULES.get(training.selection_metric, markdown_text(training.selection_metric))
    which = "" if training.selected_epoch is None else f" of epoch {training.selected_epoch + 1}"
    return Markdown(
        f"The weights are those{which} with {rule} on {report.dataset.num_validation} images held out of the training "
        "images, the latest of equal ones."
    )
