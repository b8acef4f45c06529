"""Compare rows with the baseline image by image, runs of equal seed, where both kept their predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ham_hf.comparison.differences import evaluations
from ham_hf.evaluation.verdicts import PREDICTIONS_NAME, Verdicts, match_verdicts, read_verdicts
from ham_hf.pairing import PairedComparison, compare_paired
from ham_hf.reporting.report import RunReport

PAIRED_METRICS = ("average", "worst_class", "worst_30_percent")
_ERROR = 0.05


@dataclass(frozen=True, kw_only=True)
class PairedRow:
    """A row against the baseline under one evaluation.

    Attributes:
        seeds: seeds that both have.
        differences: row minus baseline on the same images.
        higher: whether the number of the table is higher than the baseline's with every seed, by metric.
    """

    seeds: tuple[int, ...]
    differences: PairedComparison
    higher: Mapping[str, bool]

    def is_better(self, metric: str) -> bool:
        """Whether the row is significantly better than the baseline.

        With one seed: by McNemar's exact test (5 %) for the average, in the worst classes if the interval excludes 0.
        With several seeds, all must agree and the interval of the pooled difference must exclude 0. The number in the
        table must also be higher with every seed: a row that is better in the baseline's worst classes may be worse
        elsewhere.

        Args:
            metric: one of ``PAIRED_METRICS``.
        """
        difference = getattr(self.differences, metric)
        if metric == "average" and len(self.seeds) == 1:
            sure = self.differences.p_values[0] < _ERROR
        else:
            sure = difference.is_sure()
        return bool(sure and difference.mean > 0 and self.higher[metric])


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What paired tests say of the rows of a comparison.

    Attributes:
        found: by label and evaluation.
        unpaired: why a row could not be paired, by label, or by label and evaluation ("LABEL, PGD-20").
    """

    found: Mapping[str, Mapping[str, PairedRow]] = field(default_factory=dict)
    unpaired: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A finished run in its place: row ``label``, seed ``seed``; read from ``source``, a folder or Hub id.

    ``verdicts`` are its predictions; None for a run of a version that kept none.
    """

    label: str
    seed: int
    report: RunReport
    source: str
    verdicts: Verdicts | None = None


def verdicts_beside(folder: str | Path) -> Verdicts | None:
    """The predictions in a run's folder; None if there are none, as in runs of earlier versions.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    return read_verdicts(folder) if (Path(folder) / PREDICTIONS_NAME).is_file() else None


def pair_rows(rows: Mapping[str, Sequence[Run]], *, baseline: str | None, titles: Mapping[str, str]) -> Pairs:
    """Compare every row with the baseline, as far as there are predictions.

    Args:
        rows: the runs of each row by label.
        baseline: label of the reference; None, or one without runs, pairs nothing.
        titles: title of each evaluation that is comparable, by name.
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


def _pair(pairs: Sequence[tuple[Run, Run]], name: str) -> PairedRow | None:
    """One row under one evaluation; None if some run does not have it.

    Raises:
        ValueError: if the runs of a pair, or those of several seeds, saw different images.
    """
    entries = [[evaluations(run.report).get(name) for run in pair] for pair in pairs]
    summaries = [[entry.summary for entry in pair if entry is not None] for pair in entries]
    if any(len(pair) < 2 for pair in summaries):
        return None
    matched = [
        match_verdicts(reference.verdicts, other.verdicts, name)
        for reference, other in pairs
        if reference.verdicts is not None and other.verdicts is not None
    ]
    labels = matched[0].labels
    for one in matched[1:]:
        if not (torch.equal(one.labels, labels) and torch.equal(one.positions, matched[0].positions)):
            raise ValueError("the seeds were tested on different images")
    differences = compare_paired(
        torch.stack([one.reference for one in matched]),
        torch.stack([one.other for one in matched]),
        labels,
        num_classes=len(summaries[0][0].per_class),
    )
    return PairedRow(
        seeds=tuple(run.seed for _, run in pairs),
        differences=differences,
        higher={
            metric: all(getattr(other, metric) > getattr(reference, metric) for reference, other in summaries)
            for metric in PAIRED_METRICS
        },
    )
