"""Robustness per class of any model on any loader, in one call and one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ham_hf.api.loader import GroupReader, Loader, batches_of, class_names_of, held_images
from ham_hf.api.loss import unwrapped
from ham_hf.attacks import Attack, ThreatModel, evaluation_mode, outside_inference_mode
from ham_hf.data import PixelBatch
from ham_hf.data.image_groups import ImageGroups, make_groups
from ham_hf.evaluation import AttackResult, NamedAttack, evaluate_batches, standard_attacks
from ham_hf.evaluation.autoattack import evaluate_autoattack, require_autoattack
from ham_hf.evaluation.batch_sharing import Workplace
from ham_hf.evaluation.foreign import AttackFunction, ForeignAttack, foreign_attack
from ham_hf.evaluation.robustness import logits_of
from ham_hf.evaluation.verdicts import Verdicts, verdicts_of
from ham_hf.reporting.breakdowns import GroupReport, group_report
from ham_hf.reporting.formats import (
    class_cell,
    fraction_text,
    percent,
    percent_with_ends,
    plain_text,
    text_table,
    with_interval,
)
from ham_hf.reporting.report import AttackReport
from ham_hf.reporting.run_report import attack_reports, verdict_of
from ham_hf.reporting.tables import each_group_rows, group_rows

MAX_ROWS = 20
"""Classes that the table of a report lists; of more, the weakest."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EvaluationReport:
    """Robustness of a model per class; ``print`` shows it as a table.

    Attributes:
        class_names: names of the C classes in label order.
        threat_model: norm and radius of the attacks.
        clean: on clean images.
        attacks: one entry per attack, by its name, in the order they were run.
        verdict: the headline, right on the clean image and never broken by any attack; None without an attack.
            Its ``summary`` has average, worst class, gap and ``per_class`` with Wilson intervals, its ``intervals``
            those of the fairness numbers.
        verdicts: predictions and margins of every image.
        groups: accuracy by the groups of another column; None if none was named.
    """

    class_names: tuple[str, ...]
    threat_model: ThreatModel
    clean: AttackReport
    attacks: Mapping[str, AttackReport] = field(default_factory=dict)
    verdict: AttackReport | None
    verdicts: Verdicts
    groups: GroupReport | None = None

    @property
    def entries(self) -> tuple[AttackReport, ...]:
        """Verdict, clean and attacks, in the order in which tables show them."""
        return (*([] if self.verdict is None else [self.verdict]), self.clean, *self.attacks.values())

    def __str__(self) -> str:
        """Two tables: one row per evaluation, and one row per class."""
        num = self.clean.summary.num_examples
        norm, epsilon = self.threat_model.norm, float(self.threat_model.epsilon)
        budget = f"{norm} {fraction_text(epsilon)}" if epsilon else "no perturbation"
        parts = [
            f"{num} images, {len(self.class_names)} classes, {budget}; percent, with 95 % intervals",
            text_table([self._row(entry) for entry in self.entries]),
            text_table(self._class_rows()),
        ]
        if self.groups is not None:
            parts += [text_table(group_rows(self.groups)), text_table(each_group_rows(self.groups))]
        return "\n\n".join(parts)

    __repr__ = __str__

    def _row(self, entry: AttackReport) -> dict[str, str]:
        summary = entry.summary
        worst = plain_text(self.class_names[summary.worst_class_index], 30)
        return {
            "Evaluation": entry.title,
            "Images": str(summary.num_examples),
            "Average": percent_with_ends(summary.average, summary.average_low, summary.average_high),
            "Worst class": f"{with_interval(summary, entry.intervals, 'worst_class')} {worst}",
            "Worst 30 %": with_interval(summary, entry.intervals, "worst_30_percent"),
            "Gap": with_interval(summary, entry.intervals, "gap"),
        }

    def _class_rows(self) -> list[dict[str, str]]:
        headline = (self.verdict or self.clean).summary.per_class
        order = list(range(len(self.class_names)))
        if len(order) > MAX_ROWS:
            order.sort(key=lambda index: (headline[index].accuracy is None, headline[index].accuracy))
        rows = []
        for index in order[:MAX_ROWS]:
            row = {"Class": plain_text(self.class_names[index], 30), "Images": str(headline[index].count)}
            for entry in self.entries:
                found = entry.summary.per_class[index]
                row[entry.title] = class_cell(found)
                if entry is not self.entries[0] and found.accuracy is not None:
                    row[entry.title] = percent(found.accuracy)
            rows.append(row)
        return rows


def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    threat_model: ThreatModel | None = None,
    num_steps: int = 20,
    step_size: float | None = None,
    attacks: Mapping[str, AttackFunction] | Sequence[NamedAttack | ForeignAttack] | None = None,
    autoattack: bool = False,
    class_names: Sequence[str] | None = None,
    group_column: str | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> EvaluationReport:
    """Measure accuracy per class: clean, under PGD and CW, and by the verdict of both.

    The model keeps its mode, weights and BatchNorm statistics. This process evaluates all that the loader yields; with
    several processes, call it on one. Batches are read once and not kept, unless AutoAttack runs.

    Args:
        model: maps pixels (N, C, H, W) in [0, 1] to logits (N, num_classes), and normalizes by itself.
        loader: a DataLoader or iterable of (pixels, labels) or {"pixel_values", "labels"}, or `ham_hf.data.Images`.
        threat_model: norm and radius; None = linf 8/255.
        num_steps: steps of PGD and CW.
        step_size: length of their steps in pixel units; None = a quarter of epsilon.
        attacks: functions ``attack(model, x, y) -> x_adv`` by name, run beside PGD and CW and checked, see
            `ham_hf.evaluation.foreign`; or a list to run in their place and threat model; empty: clean alone.
        autoattack: also run AutoAttack (needs the extra ``ham-hf[autoattack]``); keeps all images in memory.
        class_names: in label order; None takes those of the loader's dataset, or numbers.
        group_column: key of batches that are mappings, whose strings, whole numbers or booleans are groups to report.
        device: where to compute; None = where the model is. The model is moved there.
        batch_size: images at once, for `Images` and AutoAttack; a loader has its own.
        seed: seed of the attacks.

    Raises:
        ValueError: for pixels outside [0, 1], labels that the model has no logit for, malformed or no batches, no
            step, a function whose result is outside the threat model, or if AutoAttack is not installed.
        NonFiniteLogitsError: if the logits of a clean image are not finite.
    """
    if autoattack:
        require_autoattack()
    threat_model = threat_model or ThreatModel()
    model = unwrapped(model) if device is None else unwrapped(model).to(device)
    place = device_of(model)
    length = float(threat_model.epsilon) / 4 if step_size is None else step_size
    chosen = chosen_attacks(Attack(threat_model=threat_model, num_steps=num_steps, step_size=length), attacks)
    reader = None if group_column is None else GroupReader(loader, group_column)
    loader = reader or loader
    with outside_inference_mode():
        if autoattack:
            images = held_images(loader)
        kind = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
        found = batches_of(images if autoattack else loader, place, batch_size)
        # Half precision would round the pixels of an attack.
        batches = found if kind.itemsize < 4 else (batch._replace(x=batch.x.to(kind)) for batch in found)
        if (first := next(batches, None)) is None:
            raise ValueError("there is no example to evaluate on: the loader gave no batch")
        num_classes = count_logits(model, first.x)
        results = evaluate_batches(model, _checked(chain([first], batches), num_classes), chosen, seed=seed)
        if autoattack:
            results["autoattack"] = evaluate_autoattack(
                model,
                images,
                Workplace(accelerator=one_process(place), batch_size=batch_size, seed=seed),
                num_classes=num_classes,
                threat_model=threat_model,
            )
    groups = None if reader is None else make_groups(reader.column, reader.values)
    return report_of(results, class_names_of(loader, class_names, num_classes), threat_model, groups)


def chosen_attacks(
    attack: Attack, others: Mapping[str, AttackFunction] | Sequence[NamedAttack | ForeignAttack] | None
) -> list[NamedAttack | ForeignAttack]:
    """The attacks to run in the ball of ``attack``: PGD, CW and the given functions, or a list that replaces them.

    Raises:
        ValueError: if two have one name, or PGD and CW make no step.
    """
    chosen: list[NamedAttack | ForeignAttack]
    if others is None or isinstance(others, Mapping):
        if attack.num_steps < 1 or not float(attack.step_size) >= 0:
            raise ValueError(f"expected num_steps >= 1 and step_size >= 0, got {attack.num_steps}, {attack.step_size}")
        functions = (foreign_attack(name, function) for name, function in (others or {}).items())
        chosen = [*standard_attacks(attack), *functions]
    else:
        chosen = list(others)
    names = [attack.name for attack in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two attacks are called {twice}: give each a different name")
    return [replace(one, threat_model=attack.threat_model) for one in chosen]


class OneProcess:
    """The part of ``accelerate.Accelerator`` that evaluation uses, without its process-wide state."""

    num_processes, process_index = 1, 0
    is_main_process = is_local_main_process = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


def one_process(device: torch.device) -> Accelerator:
    """An accelerator of this process alone, for evaluation and calibration."""
    return cast(Accelerator, OneProcess(device))


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights; the CPU for a model without any."""
    tensor: Tensor | None = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _checked(batches: Iterable[PixelBatch], num_classes: int) -> Iterator[PixelBatch]:
    """The batches, one by one, if the model has logits for their labels."""
    for batch in batches:
        low, high = (int(end) for end in batch.y.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"labels must lie in [0, {num_classes}), as the model has {num_classes} logits; got {low}..{high}"
            )
        yield batch


def count_logits(model: nn.Module, x: Tensor) -> int:
    """Number of logits of a model, from one of the images (N, C, H, W).

    Raises:
        ValueError: if it does not return (N, num_classes) logits.
    """
    with evaluation_mode(model):
        logits = logits_of(model, x[:1])
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model must return logits (N, num_classes) of at least two classes, got {got} for one image; wrap it "
            "in a module whose forward returns the logits"
        )
    return logits.shape[1]


def report_of(
    results: Mapping[str, AttackResult],
    class_names: tuple[str, ...],
    threat_model: ThreatModel,
    groups: ImageGroups | None = None,
) -> EvaluationReport:
    """Results by name, "clean" first, as a report."""
    reports = attack_reports(results, len(class_names))
    clean = reports.pop("clean")
    verdicts = verdicts_of(results, class_names, groups)
    return EvaluationReport(
        class_names=class_names,
        threat_model=threat_model,
        clean=clean,
        attacks=reports,
        verdict=verdict_of(results, class_names),
        verdicts=verdicts,
        groups=group_report(verdicts),
    )
