"""Accuracy by groups of a column and on corrupted images, as a report holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ham_hf.evaluation.corruption_accuracy import CorruptionResult
from ham_hf.evaluation.verdicts import Verdicts
from ham_hf.intervals import FairnessIntervals, intervals_of
from ham_hf.metrics import FairnessSummary, count_per_class, mean_of_worst, summarize

SUMMARIZED = ("average", "average_low", "average_high", "worst_class", "worst_class_index", "worst_30_percent")
"""Numbers of `FairnessSummary` that are kept of each corruption."""


@dataclass(frozen=True, kw_only=True)
class GroupAccuracy:
    """One evaluation by groups: their numbers and intervals, with groups where `FairnessSummary` says classes."""

    summary: FairnessSummary
    intervals: FairnessIntervals


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """Accuracy by the groups of a column of the test split.

    Attributes:
        column: name of the column.
        names: of the groups; the last one is of the images without a value, where there are any.
        num_missing: images without a value.
        results: by name of the evaluation, "verdict" first.
    """

    column: str
    names: tuple[str, ...]
    num_missing: int
    results: Mapping[str, GroupAccuracy]

    def __post_init__(self) -> None:
        for name, found in self.results.items():
            summary = found.summary
            if len(summary.per_class) != len(self.names) or not 0 <= summary.worst_class_index < len(self.names):
                raise ValueError(f"{name}: the numbers are not of the {len(self.names)} groups of {self.column}")


@dataclass(frozen=True, kw_only=True)
class CorruptedAccuracy:
    """Accuracy under one corruption of one severity.

    Attributes:
        name, severity: of the corruption; severity is 1 to 5.
        correct: right images of each of the C classes.
        seconds: duration.

    The others are as in `FairnessSummary`.
    """

    name: str
    severity: int
    average: float
    average_low: float
    average_high: float
    worst_class: float
    worst_class_index: int
    worst_30_percent: float
    correct: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CorruptionReport:
    """Accuracy on corrupted images.

    Attributes:
        constants: whose constants were used: "CIFAR-10-C" or "ImageNet-C", with the size they are meant for if the
            images have a different one.
        severities: that were computed.
        counts: images of each of the C classes.
        mean: mean corruption accuracy: the mean over all corruptions and severities of ``results``.
        class_means: likewise of each class; None where it has no image.
        worst_class: smallest of ``class_means``.
        worst_class_index: class that has it.
        worst_30_percent: mean of the ceil(3 C / 10) smallest of ``class_means``.
        results: one entry per corruption and severity.
    """

    constants: str
    severities: tuple[int, ...]
    counts: tuple[int, ...]
    mean: float
    class_means: tuple[float | None, ...]
    worst_class: float
    worst_class_index: int
    worst_30_percent: float
    results: tuple[CorruptedAccuracy, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.counts), len(self.class_means), *(len(found.correct) for found in self.results)}
        worst = (self.worst_class_index, *(found.worst_class_index for found in self.results))
        if len(sizes) > 1 or not all(0 <= index < len(self.counts) for index in worst) or not self.results:
            raise ValueError(f"the numbers on corrupted images are not of {len(self.counts)} classes")

    @property
    def names(self) -> tuple[str, ...]:
        """The corruptions, in order."""
        return tuple(dict.fromkeys(found.name for found in self.results))


def group_report(verdicts: Verdicts) -> GroupReport | None:
    """Verdict, clean and each attack by groups, over the images that each saw; None without groups."""
    groups = verdicts.groups
    if groups is None:
        return None
    results = {}
    for name in ("verdict", "clean", *verdicts.attacked):
        seen = verdicts.seen(name)
        if not bool(seen.any()):
            continue
        summary = summarize(verdicts.right(name)[seen], groups.of_image[seen], len(groups.names))
        results[name] = GroupAccuracy(summary=summary, intervals=intervals_of(summary))
    return GroupReport(column=groups.column, names=groups.names, num_missing=groups.num_missing, results=results)


def corruption_report(
    results: Sequence[CorruptionResult], labels: Tensor, num_classes: int, *, constants: str
) -> CorruptionReport | None:
    """Results of every corruption and severity on images with ``labels`` (N,) in numbers; None if there are none."""
    if not results:
        return None
    counts = count_per_class(labels, num_classes).tolist()
    present = [index for index, count in enumerate(counts) if count]
    found = []
    for result in results:
        summary = summarize(result.flags, labels, num_classes)
        found.append(
            CorruptedAccuracy(
                name=result.name,
                severity=result.severity,
                **{name: getattr(summary, name) for name in SUMMARIZED},
                correct=tuple(entry.correct for entry in summary.per_class),
                seconds=result.seconds,
            )
        )
    means = {index: sum(entry.correct[index] for entry in found) / len(found) / counts[index] for index in present}
    worst = min(present, key=lambda index: (means[index], index))
    return CorruptionReport(
        constants=constants,
        severities=tuple(dict.fromkeys(entry.severity for entry in found)),
        counts=tuple(counts),
        mean=sum(entry.average for entry in found) / len(found),
        class_means=tuple(means.get(index) for index in range(num_classes)),
        worst_class=means[worst],
        worst_class_index=worst,
        worst_30_percent=mean_of_worst(list(means.values()), 30),
        results=tuple(found),
    )
