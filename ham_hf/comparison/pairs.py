"""Compare rows with the baseline image by image, runs of equal seed, where both kept their predictions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ham_hf.artifacts import PREDICTIONS_NAME
from ham_hf.comparison.differences import IMAGES, conditions, evaluations
from ham_hf.evaluation.verdicts import Verdicts, match_verdicts
from ham_hf.intervals import REPETITIONS
from ham_hf.metrics import num_worst, summarize
from ham_hf.reporting.report import RunReport

PAIRED_METRICS = ("average", "worst_class", "worst_30_percent")
_ERROR = 0.05
_ENDS = (0.025, 0.975)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Other minus reference, with its 95 % interval; all in [-1, 1].

    Attributes:
        per_seed: the difference of each pair of runs.
        mean: mean of ``per_seed``.
        low, high: ends of the interval of ``mean`` (percentile bootstrap).
    """

    per_seed: tuple[float, ...]
    mean: float
    low: float
    high: float

    def is_sure(self) -> bool:
        """Whether all pairs agree which model is better and the interval excludes 0."""
        agree = all(value > 0 for value in self.per_seed) or all(value < 0 for value in self.per_seed)
        return agree and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Paired test of another model against a reference.

    Attributes:
        num_examples: images that both were judged on.
        average, worst_class, worst_30_percent: differences of the averages, on the class that is the reference's
            worst, and of the means of the classes that are its worst 30 %.
        only_reference, only_other: images that only one of the two is right on, of each pair.
        p_values: exact McNemar test of each pair (`mcnemar`).
    """

    num_examples: int
    average: Difference
    worst_class: Difference
    worst_30_percent: Difference
    only_reference: tuple[int, ...]
    only_other: tuple[int, ...]
    p_values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PairedRow:
    """A row against the baseline under one evaluation.

    Attributes:
        seeds: seeds that both have.
        differences: row minus baseline on the images that all runs of both saw.
        higher: whether the number is higher than the baseline's with every seed, by metric, in the table and on these
            images.
    """

    seeds: tuple[int, ...]
    differences: PairedComparison
    higher: Mapping[str, bool]

    def is_better(self, metric: str) -> bool:
        """Whether the row is significantly better than the baseline.

        With one seed: by McNemar's exact test (5 %) for the average, in the worst classes if the interval excludes 0.
        With several seeds, all must agree and the interval of the pooled difference must exclude 0. The number must
        also be `higher` with every seed: a row that is better in the baseline's worst classes may be worse
        elsewhere.
        """
        difference = getattr(self.differences, metric)
        if metric == "average" and len(self.seeds) == 1:
            sure = self.differences.p_values[0] < _ERROR
        else:
            sure = difference.is_sure()
        return bool(sure and difference.mean > 0 and self.higher[metric])


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Paired tests of the rows of a comparison.

    Attributes:
        found: by label and evaluation.
        unpaired: why a row could not be paired, by label, or by label and evaluation ("LABEL, PGD-20").
    """

    found: Mapping[str, Mapping[str, PairedRow]] = field(default_factory=dict)
    unpaired: Mapping[str, str] = field(default_factory=dict)

    def reason(self, label: str, title: str) -> str:
        """Why a row could not be paired under the evaluation of this title; empty if it was, or is the baseline."""
        return self.unpaired.get(f"{label}, {title}") or self.unpaired.get(label, "")


@dataclass(frozen=True, eq=False, kw_only=True)
class FinishedRun:
    """A finished run in its place: row ``label``, seed ``seed``; read from ``source``, a folder or Hub id.

    ``verdicts`` are its predictions; None for a run of a version that kept none.
    """

    label: str
    seed: int
    report: RunReport
    source: str
    verdicts: Verdicts | None = None


def pair_rows(rows: Mapping[str, Sequence[FinishedRun]], *, baseline: str | None, titles: Mapping[str, str]) -> Pairs:
    """Compare every row with the baseline (without one: none), as far as there are predictions.

    Rows with other settings of evaluation are not paired. ``titles`` are those of each evaluation, by name.
    """
    base = {run.seed: run for run in rows.get(baseline or "", ())}
    found, unpaired = dict[str, Mapping[str, PairedRow]](), dict[str, str]()
    for label, runs in rows.items():
        if label == baseline or not base:
            continue
        pairs = [(base[run.seed], run) for run in runs if run.seed in base]
        without = sorted({run.seed for pair in pairs for run in pair if run.verdicts is None})
        if not pairs:
            unpaired[label] = "no seed in common with the baseline"
        elif without:
            listed = ", ".join(map(str, without))
            unpaired[label] = f"no {PREDICTIONS_NAME} of it or of the baseline with seed {listed}"
        else:
            paired_rows = dict[str, PairedRow]()
            for name, title in titles.items():
                try:
                    paired = _pair(pairs, name)
                except ValueError as error:  # noqa: PERF203 (each evaluation has a reason of its own)
                    unpaired[f"{label}, {title}"] = str(error)
                else:
                    paired_rows |= {} if paired is None else {name: paired}
            found[label] = paired_rows
    return Pairs(found=found, unpaired=unpaired)


def _pair(pairs: Sequence[tuple[FinishedRun, FinishedRun]], name: str) -> PairedRow | None:
    """One row under one evaluation; None if some run does not have it."""
    entries = [[evaluations(run.report).get(name) for run in pair] for pair in pairs]
    summaries = [[entry.summary for entry in pair if entry is not None] for pair in entries]
    if any(len(pair) < 2 for pair in summaries):
        return None
    facts = [conditions(run.report, name) for pair in pairs for run in pair]
    titles = dict.fromkeys(title for found in facts for title in found if title != IMAGES)
    if different := [title for title in titles if len({found.get(title) for found in facts}) > 1]:
        raise ValueError(f"evaluated with other settings than the baseline ({', '.join(different)})")
    reports = [run.report for pair in pairs for run in pair if run.report.training and not run.report.dataset.hub_id]
    images = {(report.dataset.trained_on or {}).get("image_fingerprint") for report in reports} - {None}
    if len(images) > 1:
        raise ValueError("trained on other images: local folders of one name hold different ones")
    matched = [
        match_verdicts(reference.verdicts, other.verdicts, name)
        for reference, other in pairs
        if reference.verdicts is not None and other.verdicts is not None
    ]
    common = torch.from_numpy(functools.reduce(np.intersect1d, [one.positions.numpy() for one in matched]))
    first, *others = matched = [one.at(common) for one in matched]
    same = [torch.equal(one.positions, first.positions) and torch.equal(one.labels, first.labels) for one in others]
    if not (len(common) and all(same)):
        raise ValueError("the seeds were tested on different images")
    reference, other = (torch.stack([getattr(one, side) for one in matched]) for side in ("reference", "other"))
    num_classes = len(summaries[0][0].per_class)
    flags = zip(reference, other, strict=True)
    summaries += [[summarize(one, first.labels, num_classes) for one in pair] for pair in flags]
    return PairedRow(
        seeds=tuple(run.seed for _, run in pairs),
        differences=compare_paired(reference, other, first.labels, num_classes=num_classes),
        higher={
            metric: all(getattr(new, metric) > getattr(old, metric) for old, new in summaries)
            for metric in PAIRED_METRICS
        },
    )


def mcnemar(only_reference: int, only_other: int) -> float:
    """Two-sided p-value of McNemar's test, exact: the chance of so uneven a split if each side were as likely.

    Raises:
        ValueError: if a count is negative.
    """
    if min(only_reference, only_other) < 0:
        raise ValueError(f"expected counts >= 0, got {only_reference} and {only_other}")
    num = only_reference + only_other
    ways = total = 1
    for index in range(min(only_reference, only_other)):
        ways = ways * (num - index) // (index + 1)
        total += ways
    # Whole numbers until the last division, which rounds once.
    return min(1.0, float(2 * total / (1 << num)))


def compare_paired(reference: Tensor, other: Tensor, labels: Tensor, *, num_classes: int) -> PairedComparison:
    """Compare two models on the same images, in one or several pairs of runs (one per training seed).

    Averages: exact McNemar test per pair. All three differences: bootstrap of images within each class, the same
    images for both models and all pairs. The worst classes are those of each pair's reference and are not chosen again
    in each resample. They were chosen for being low, so the reference is a little better there than it looks, and
    small gains in these classes are partly that. The intervals do not cover other training seeds: see ``per_seed``.

    Args:
        reference: (S, N) bool, right or not, one row per pair.
        other: (S, N) bool, in the same order.
        labels: (N,) in [0, num_classes).
        num_classes: C.

    Raises:
        ValueError: if shapes differ or there is no image.
    """
    if reference.ndim != 2 or reference.shape != other.shape or reference.shape[1:] != labels.shape:
        raise ValueError(
            f"expected flags (pairs, images) of both models and labels (images,), got {tuple(reference.shape)}, "
            f"{tuple(other.shape)} and {tuple(labels.shape)}"
        )
    pairs = range(len(reference))
    worst = [_worst_first(flags, labels, num_classes) for flags in reference]
    flags = np.concatenate([reference.numpy(), other.numpy()]).astype(np.int64)  # (2 S, N)
    counts = np.bincount(labels.numpy(), minlength=num_classes)
    # Right images of each class and run, (1, C, 2 S).
    sums = [np.bincount(labels.numpy(), row, num_classes) for row in flags]
    seen = np.stack(sums, axis=1).astype(np.int64)[None]
    drawn = _resample(flags, labels.numpy(), counts)

    def of_classes(classes: list[list[int]]) -> Difference:
        """Difference of the mean over these classes of each pair."""
        return _difference(*(_mean_difference(of, counts, classes, len(reference)) for of in (seen, drawn)))

    totals = [(of[..., len(reference) :] - of[..., : len(reference)]).sum(1) / len(labels) for of in (seen, drawn)]
    only_reference = [int((reference[pair] & ~other[pair]).sum()) for pair in pairs]
    only_other = [int((other[pair] & ~reference[pair]).sum()) for pair in pairs]
    return PairedComparison(
        num_examples=len(labels),
        average=_difference(*totals),
        worst_class=of_classes([classes[:1] for classes in worst]),
        worst_30_percent=of_classes([classes[: num_worst(len(classes))] for classes in worst]),
        only_reference=tuple(only_reference),
        only_other=tuple(only_other),
        p_values=tuple(mcnemar(*numbers) for numbers in zip(only_reference, only_other, strict=True)),
    )


def _difference(seen: NDArray[np.float64], drawn: NDArray[np.float64]) -> Difference:
    """From the differences of S pairs: those seen (1, S), and resampled (REPETITIONS, S)."""
    low, high = np.quantile(drawn.mean(1), _ENDS)
    values = tuple(seen[0].tolist())
    return Difference(per_seed=values, mean=float(np.mean(values)), low=float(low), high=float(high))


def _worst_first(flags: Tensor, labels: Tensor, num_classes: int) -> list[int]:
    per_class = summarize(flags, labels, num_classes).per_class
    present = [index for index, entry in enumerate(per_class) if entry.accuracy is not None]
    return sorted(present, key=lambda index: (per_class[index].accuracy, index))


def _resample(flags: NDArray[np.int64], labels: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(REPETITIONS, C, 2 S) right images when those of each class are drawn again.

    Images with the same outcome in all runs count as one kind: how often a kind is drawn is multinomial.
    """
    generator = np.random.default_rng(0)
    drawn = np.zeros((REPETITIONS, len(counts), len(flags)), dtype=np.int64)
    for label in counts.nonzero()[0]:
        kinds, sizes = np.unique(flags[:, labels == label].T, axis=0, return_counts=True)
        drawn[:, label] = generator.multinomial(counts[label], sizes / counts[label], REPETITIONS) @ kinds
    return drawn


def _mean_difference(
    sums: NDArray[np.int64], counts: NDArray[np.int64], classes: list[list[int]], pairs: int
) -> NDArray[np.float64]:
    """(REPETITIONS, S) other minus reference, of the mean accuracy of some classes of each pair."""
    columns = [
        ((sums[:, chosen, pairs + pair] - sums[:, chosen, pair]) / counts[chosen]).mean(1)
        for pair, chosen in enumerate(classes)
    ]
    return np.stack(columns, axis=1)
