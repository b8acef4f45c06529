"""``report.html``: one self-contained page that shows which class fails and why.

The file holds everything: style, script, numbers as JSON, images as data URIs. A content security policy in the page
forbids every request, and every style and script but the page's own, by their hashes. Class names are data: the
template escapes them, and the script sets them as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from ham_hf.evaluation.verdicts import Verdicts
from ham_hf.hub_config import HUB
from ham_hf.reporting.class_examples import ClassExamples
from ham_hf.reporting.formats import (
    evaluation_title,
    fraction_text,
    norm_text,
    percent,
    percent_ends,
    plain_text,
    public_word,
)
from ham_hf.reporting.report import AttackReport, RunReport
from ham_hf.reporting.tables import breakdown_tables

SPACE_TAG = "ham_hf"
"""Marks a Space that ham_hf made and may overwrite."""
MAX_PAGE_BYTES = 2_000_000
MAX_NAME_LENGTH = 200
MAX_CURVE_POINTS = 60
"""Validations per curve; of more, every so many are shown and always the last."""
MAX_TAKEN_FOR = 10
"""Classes that one is taken for, listed where there are more than ``MANY_CLASSES``."""
MANY_CLASSES = 200
_IMAGES = re.compile(r'(<script type="application/json" id="images">).*?(</script>)', flags=re.DOTALL)
_NO_IMAGES = "[]"


@dataclass(frozen=True, eq=False, kw_only=True)
class PageRun:
    """One run on a page; without ``verdicts``, what classes are taken for is known where it has a confusion matrix."""

    report: RunReport
    verdicts: Verdicts | None = None
    examples: ClassExamples | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Its name: the label or, without one, the model."""
        return self.label or plain_text(Path(self.report.model.name).name)


def page_html(runs: Sequence[PageRun], comparison: Mapping[str, object] | None = None) -> str:
    """The page of one run or several; images of later runs are left out where it would exceed ``MAX_PAGE_BYTES``.

    Args:
        runs: at least one; the page opens with the first.
        comparison: how they compare, as ``page.js`` reads it: ``baseline`` and, under ``rows``, by title of the
            evaluation the label, seeds, values, differences and note of each row; None leaves it out.

    Raises:
        ValueError: if there is no run.
    """
    if not runs:
        raise ValueError("a page needs at least one run, got none")
    images = [_image_values(run.examples) for run in runs]
    numbers = script_json({"runs": [_run_values(run) for run in runs], "comparison": comparison})
    report = runs[0].report
    while True:
        html = render_page(
            "page.html.jinja",
            styles=["page.css"],
            script="page.js",
            title=f"{runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}: weak classes",
            several=len(runs) > 1,
            facts=_facts(report),
            rows=_headline(report),
            tables=breakdown_tables(report),
            notes=[plain_text(note, 1000) for note in report.notes],
            numbers=numbers,
            images=script_json(list(images) if any(images) else []),
        )
        filled = [index for index, entry in enumerate(images) if entry is not None]
        if len(html.encode()) <= MAX_PAGE_BYTES or not filled:
            return html
        images[filled[-1]] = None


def has_images(html: str) -> bool:
    """Whether a page shows images of the dataset."""
    return without_images(html) != html


def without_images(html: str) -> str:
    """The page without images of the dataset; everything else stays."""
    return _IMAGES.sub(rf"\g<1>{_NO_IMAGES}\g<2>", html)


def space_files(html: str, report: RunReport, repo_id: str) -> dict[str, bytes]:
    """A static Space that shows a page: its files by name. The page and the Space's description link the model."""
    link = f'<a href="{HUB}/{repo_id}" target="_blank" rel="noopener">{repo_id}</a>'
    about = {
        "title": f"{plain_text(repo_id.split('/')[-1])}: weak classes",
        "emoji": "🎯",
        "colorFrom": "blue",
        "colorTo": "yellow",
        "sdk": "static",
        "app_file": "index.html",
        "pinned": False,
        "short_description": "Which classes fail under attack, and why",
        "models": [repo_id],
        **({"datasets": [report.dataset.hub_id]} if report.dataset.hub_id else {}),
        "tags": [SPACE_TAG, "adversarial-robustness", "robust-fairness"],
    }
    readme = (
        f"---\n{yaml.safe_dump(about, allow_unicode=True, sort_keys=False)}---\n\n"
        f"Accuracy of [{repo_id}]({HUB}/{repo_id}) class by class, clean and under attack.\n"
        "Made by ham_hf; the page makes no network request.\n"
    )
    page = html.replace('<footer class="quiet">', f'<footer class="quiet"><p>The model: {link}.</p> ', 1)
    return {"README.md": readme.encode(), "index.html": page.encode()}


def script_json(value: object) -> Markup:
    """JSON to stand in a script element: no character in it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 (nothing in it can end the element)


def render_page(template: str, *, styles: Sequence[str], script: str, title: str, **context: object) -> str:
    """A self-contained page: ``page_base.html.jinja`` around a template of this folder, which escapes every value.

    ``styles`` and ``script``, the only one that the page may run, are files of this folder; ``context`` is what the
    template shows.
    """
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, code = "".join(map(_source, styles)), _source(script)
    return environment.get_template(template).render(
        style=Markup(style),  # noqa: S704 (our own files)
        script=Markup(code),  # noqa: S704 (our own file)
        style_hash=_source_hash(style),
        script_hash=_source_hash(code),
        title=title,
        **context,
    )


def _source(name: str) -> str:
    return (files("ham_hf.reporting") / name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _facts(report: RunReport) -> list[tuple[str, str]]:
    """Facts about the first run, which are shown without any script."""
    facts = [
        ("Model", plain_text(public_word(report.model.name), 120)),
        ("Dataset", plain_text(report.dataset.title, 120)),
        ("Classes", f"{len(report.dataset.class_names):,}"),
        ("Test images", f"{report.dataset.num_test:,}"),
        ("Threat model", f"{norm_text(report.threat_model.norm)}, ε = {fraction_text(report.threat_model.epsilon)}"),
    ]
    method = report.config.get("method") if report.training is not None else None
    if method:
        facts.append(("Method", plain_text(method)))
    made = report.created.replace("T", " ").replace("+00:00", " UTC")
    return [*facts, ("Made", plain_text(made))]


def _headline(report: RunReport) -> list[dict[str, object]]:
    """Of each evaluation: title, images, and value, interval and class of the average, worst 30 % and worst class."""
    rows: list[dict[str, object]] = []
    for entry in report.entries():
        summary, known = entry.summary, entry.intervals
        worst_name = plain_text(report.dataset.class_names[summary.worst_class_index], MAX_NAME_LENGTH)
        cells = (
            (summary.average, (summary.average_low, summary.average_high), ""),
            (summary.worst_30_percent, known.worst_30_percent if known else None, ""),
            (summary.worst_class, known.worst_class if known else None, worst_name),
        )
        shown = [(percent(value), percent_ends(ends), name) for value, ends, name in cells]
        rows.append({"title": entry.title, "images": f"{summary.num_examples:,}", "cells": shown})
    return rows


def _run_values(run: PageRun) -> dict[str, object]:
    report, verdicts = run.report, run.verdicts
    if verdicts is not None and verdicts.class_names != report.dataset.class_names:
        raise ValueError(f"{run.name}: its predictions are of other classes than its report; evaluate it again")
    return {
        "label": plain_text(run.name, 120),
        "names": [plain_text(name, MAX_NAME_LENGTH) for name in report.dataset.class_names],
        "entries": [_entry_values(report, entry, verdicts) for entry in report.entries()],
        "curves": _curve_values(report),
        "frontier": _frontier_values(report),
    }


def _entry_values(report: RunReport, entry: AttackReport, verdicts: Verdicts | None) -> dict[str, object]:
    return {
        "name": entry.name,
        "title": entry.title,
        "settings": _settings_text(entry),
        "images": entry.summary.num_examples,
        "subset": report.is_subset(entry),
        "average": rounded([entry.summary.average, entry.summary.average_low, entry.summary.average_high]),
        "classes": [
            [found.count, found.correct, *rounded([found.low, found.high])] for found in entry.summary.per_class
        ],
        "taken": _taken_for(entry, verdicts),
    }


def _taken_for(entry: AttackReport, verdicts: Verdicts | None) -> list[list[int]] | None:
    """Of each class: other classes and how often it was taken for each, most often first; -1 stands for not finite.

    Under the verdict, the class that the first evaluation that broke the image found. None where it is not known.
    """
    num_classes = len(entry.summary.per_class)
    if verdicts is not None and (entry.name in ("verdict", "clean") or entry.name in verdicts.attacked):
        seen = verdicts.seen(entry.name)
        predictions = _wrong_predictions(verdicts, entry.name)[seen]
        counts = Counter(zip(verdicts.labels[seen].tolist(), predictions.tolist(), strict=True))
    elif entry.confusion is not None:
        rows = enumerate(entry.confusion)
        counts = Counter({(label, other): count for label, row in rows for other, count in enumerate(row) if count})
    else:
        return None
    taken: list[list[int]] = [[] for _ in range(num_classes)]
    limit = 2 * (MAX_TAKEN_FOR if num_classes > MANY_CLASSES else num_classes)
    for (label, other), count in sorted(counts.items(), key=lambda found: (-found[1], found[0])):
        if other != label and len(taken[label]) < limit:
            taken[label] += [other, count]
    return taken


def _wrong_predictions(verdicts: Verdicts, name: str) -> Tensor:
    """(N,) what an evaluation made of each image; of an image that is right by it, its label."""
    if name == "clean":
        return verdicts.clean
    # An image is right under an attack only if it is right when clean, too.
    predictions = verdicts.clean
    for attack in verdicts.attacked if name == "verdict" else (name,):
        attacked = verdicts.attacked[attack]
        predictions = torch.where((predictions == verdicts.labels) & verdicts.seen(attack), attacked, predictions)
    return predictions


def _curve_values(report: RunReport) -> dict[str, object] | None:
    """Validations of a training: epochs from 1, accuracies, and the hard fraction of each class, as far as known."""
    if report.training is None or not report.training.history:
        return None
    history = report.training.history
    step = math.ceil(len(history) / MAX_CURVE_POINTS)
    # Counted from the end, so that the last one is there.
    lines = history[::-1][::step][::-1]
    hard = [_numbers(line.get("hard_per_class")) for line in lines]
    return {
        "steps": [line.get("step") for line in lines],
        "epochs": [int(epoch) + 1 if isinstance(epoch := line.get("epoch"), (int, float)) else None for line in lines],
        "clean": _numbers([line.get("clean_accuracy") for line in lines]),
        "robust": _numbers([line.get("robust_accuracy") for line in lines]),
        "worst": _numbers([line.get("worst_class") for line in lines]),
        "hard": hard if any(hard) else None,
        "selected": report.training.selected_step,
    }


def _numbers(values: object) -> list[float | None] | None:
    if not isinstance(values, (list, tuple)):
        return None
    return [round(float(value), 3) if isinstance(value, (int, float)) else None for value in values]


def _frontier_values(report: RunReport) -> dict[str, object] | None:
    found = report.calibration
    if found is None:
        return None
    return {
        "chosen": found.fairness,
        "images": plain_text(found.images, 300),
        "seen": found.seen_in_training,
        "counts": list(found.counts),
        "points": [
            {
                "fairness": point.fairness,
                "average": rounded([point.average, point.average_low, point.average_high]),
                "worst": rounded([point.worst_class, point.worst_class_low, point.worst_class_high]),
                "worst30": rounded([point.worst_30_percent, point.worst_30_percent_low, point.worst_30_percent_high]),
                "correct": list(point.correct),
            }
            for point in found.frontier
        ],
    }


def _image_values(examples: ClassExamples | None) -> dict[str, object] | None:
    if examples is None or not examples.examples:
        return None
    return {
        "attack": plain_text(examples.attack),
        "images": [
            {
                "label": example.label,
                "position": example.position,
                "kind": example.kind,
                "margin": round(example.margin, 2) if math.isfinite(example.margin) else None,
                "before": example.clean_prediction,
                "after": example.attacked_prediction,
                "times": round(example.enlargement, 1),
                "pictures": [
                    base64.b64encode(picture).decode()
                    for picture in (example.clean, example.attacked, example.difference)
                ],
            }
            for example in examples.examples
        ],
    }


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Shares as a page holds them, with six decimals."""
    return [None if value is None else round(value, 6) for value in values]


def _settings_text(entry: AttackReport) -> str:
    settings = entry.settings
    if entry.name == "verdict":
        attacks = settings.get("attacks")
        listed = ", ".join(evaluation_title(str(name)) for name in attacks) if isinstance(attacks, list) else ""
        return plain_text(f"right on the clean image and never broken by {listed}", 300)
    parts = []
    if "norm" in settings:
        parts.append(norm_text(str(settings["norm"])))
    for key, before in (("epsilon", "ε = "), ("step_size", "steps of ")):
        value = settings.get(key)
        if isinstance(value, (int, float)):
            parts.append(f"{before}{fraction_text(float(value))}")
    if isinstance(settings.get("num_steps"), int):
        parts.append(f"{settings['num_steps']} steps")
    if entry.name == "clean":
        return "clean images"
    return plain_text(", ".join(parts), 300) if parts else ""
