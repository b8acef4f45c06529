"""Finished runs -> one comparison: mean and spread over seeds of every number, side by side.

Runs with one label are one row, and differ only in their seed. Spread is the *sample* standard deviation over seeds
(divisor n - 1); a single seed has none. A comparison also lists what the rows do not share (images, epochs, budget of
the attack ...): a table of unequal runs would look like one of equal runs.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ham_hf.comparison.differences import ByValue, budget, by_value, conditions, evaluations, machine_of, run_settings
from ham_hf.comparison.pairs import PAIRED_METRICS, FinishedRun, Pairs, pair_rows
from ham_hf.metrics import FairnessSummary, num_worst
from ham_hf.reporting.formats import short_names

METRIC_TITLES = {"average": "Average", "worst_class": "Worst class", "worst_30_percent": "Worst 30 %", "nsd": "NSD"}
METRICS = tuple(METRIC_TITLES)
LOWER_IS_BETTER = frozenset({"nsd"})


@dataclass(frozen=True, kw_only=True)
class MissingRun:
    """A run without a report: what became of it, and why, in words.

    ``state`` is "failed" (tried without success, or its report cannot be read), "running" (a process is running it),
    "not finished" (begun some time) or "not run". ``seed`` is None where it is not known.
    """

    label: str
    seed: int | None
    state: Literal["failed", "running", "not finished", "not run"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation of ``values``, one per seed; ``std`` is None of a single value."""

    mean: float
    std: float | None
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """One row under one evaluation; accuracies in [0, 1].

    Attributes:
        seeds: of the runs that have this evaluation.
        num_examples: images seen, of every run.
        average, worst_class, worst_30_percent, nsd: see `FairnessSummary`; which class is the worst may differ
            between seeds. NSD is None if a run has none (all accuracies 0).
        rho: relative trade-off against the baseline, from the means; None without a baseline, where the
            baseline's worst class or average is 0, or where the evaluations differ (`Comparison.alike`).
        image_variances: variance of a run's number from the finite test set, by metric, mean over the runs; NSD has
            none (`image_variances`).
        per_class: mean over seeds of each class' accuracy; None for a class without images.
    """

    seeds: tuple[int, ...]
    num_examples: tuple[int, ...]
    average: Spread
    worst_class: Spread
    worst_30_percent: Spread
    nsd: Spread | None
    rho: float | None
    image_variances: Mapping[str, float]
    per_class: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one label.

    Attributes:
        runs: by seed.
        attacks: numbers under each evaluation that one of the runs has.
        seconds: duration of training and calibration; None if no run was trained here.
        passes: passes over the network in both, in forwards of one image; None unless all its runs counted them.
        price: the same relative to the baseline's; None without a baseline, or where either did not count.
        peak_memory_bytes: see `ham_hf.reporting.report.TrainingReport`; None if no run knows it.
        settings: its settings, as far as the rows differ in them.
    """

    label: str
    runs: tuple[FinishedRun, ...]
    attacks: Mapping[str, AttackRow]
    seconds: Spread | None
    passes: Spread | None
    price: float | None
    peak_memory_bytes: Spread | None
    settings: Mapping[str, object]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs."""
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows side by side.

    Attributes:
        rows: in the order in which the labels were given.
        attacks: title of every evaluation that a run has, by name, in the order in which they were run.
        baseline: label that rho is relative to; None if there is none.
        class_names: names of the C classes; None if the runs do not have the same.
        budget: what a fair comparison needs to be equal: images, network, threat model, length, evaluation.
        environment: hardware and software.
        alike: by evaluation, labels of the rows that were evaluated as the baseline was: on the same images, under the
            same threat model and settings; the others have no rho and are never best. Without a baseline: all rows, or
            none if some differ.
        missing: runs that failed or are not there.
    """

    rows: tuple[Row, ...]
    attacks: Mapping[str, str]
    baseline: str | None
    class_names: tuple[str, ...] | None
    budget: ByValue
    environment: ByValue
    alike: Mapping[str, frozenset[str]]
    missing: tuple[MissingRun, ...]
    pairs: Pairs = field(default_factory=Pairs)

    @property
    def names(self) -> dict[str, str]:
        """Name of each row and missing run in tables and figures, by label: short, and different for each."""
        return short_names([row.label for row in self.rows] + [run.label for run in self.missing])

    def unlike(self, attack: str) -> list[str]:
        """Labels of the rows that have an evaluation and are not `alike`."""
        return [row.label for row in self.rows if attack in row.attacks and row.label not in self.alike[attack]]

    @property
    def unequal(self) -> ByValue:
        """The part of ``budget`` in which the runs differ."""
        return {title: values for title, values in self.budget.items() if len(values) > 1}

    def strongest_shared_attack(self) -> str | None:
        """The evaluation that figures show: of those that all runs share, the one with the lowest mean average.

        Evaluations of a part of the test images count only if there is no other; clean is none.
        """
        reports = [run.report for row in self.rows for run in row.runs]
        shared = [name for name in self.attacks if name != "clean" and all(name in r.results for r in reports)]
        full = [name for name in shared if not any(r.is_subset(r.results[name]) for r in reports)]
        return min(
            full or shared,
            key=lambda name: statistics.fmean(row.attacks[name].average.mean for row in self.rows),
            default=None,
        )

    def is_bold(self, label: str, attack: str, metric: str) -> bool:
        """Whether tables show a number in bold: by paired tests against the baseline where runs kept predictions.

        Without predictions, and for NSD, which has no paired test: if the row is the `best` beyond the noise.
        """
        if self.pairs.found and metric in PAIRED_METRICS:
            paired = self.pairs.found.get(label, {}).get(attack)
            return paired is not None and paired.is_better(metric)
        return self.best(attack, metric) == label

    def best(self, attack: str, metric: str) -> str | None:
        """Label of the row that is best beyond the noise, if one is (our choice of a rule).

        Its mean has to be better than the next best by more than the root of ``std_a^2 + std_b^2 + v_a + v_b``, with
        the spread over seeds and the variance ``v`` of having few test images, which is not divided by the number of
        seeds: all see the same images. Both need two seeds, and only rows that are `alike` count.
        """
        spreads = {
            row.label: spread
            for row in self.rows
            if row.label in self.alike[attack] and (spread := getattr(row.attacks[attack], metric)) is not None
        }
        order = sorted(spreads, key=lambda label: spreads[label].mean, reverse=metric not in LOWER_IS_BETTER)
        if len(order) < 2:
            return None
        first, second = (spreads[label] for label in order[:2])
        if first.std is None or second.std is None:
            return None
        images = [row.attacks[attack].image_variances.get(metric, 0.0) for row in self.rows if row.label in order[:2]]
        noise = math.sqrt(first.std**2 + second.std**2 + sum(images))
        # Means of equal values differ in the last bit.
        tie = math.isclose(first.mean, second.mean, rel_tol=1e-9, abs_tol=1e-9)
        return order[0] if abs(first.mean - second.mean) > noise and not tie else None


def _by_label(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    for label, members in found.items():
        members.sort(key=lambda run: run.seed)
        for one, other in itertools.pairwise(members):
            if one.seed == other.seed:
                raise ValueError(
                    f"{one.source} and {other.source} are the same run ({label}, seed {one.seed}); give one of them"
                )
    return found


def compare(
    runs: Sequence[FinishedRun], *, baseline: str | None = None, missing: Sequence[MissingRun] = ()
) -> Comparison:
    """Put runs side by side.

    Runs of one label differ in the seed alone. A seed that some row has and another lacks without an entry in
    ``missing`` gets one.

    Raises:
        ValueError: if there is no run, two runs have the same label and seed, or no run has the baseline's label.
    """
    if not runs:
        raise ValueError("there is no finished run to compare")
    by_label = _by_label(runs)
    if baseline is not None and baseline not in {*by_label, *(run.label for run in missing)}:
        raise ValueError(f"--baseline {baseline}: expected one of {', '.join(by_label)}")
    titles = {name: attack.title for run in runs for name, attack in evaluations(run.report).items()}
    # The verdict comes first, whichever run is the first to have one.
    titles = {name: titles[name] for name in sorted(titles, key=lambda name: name != "verdict")}
    alike = {name: _alike(by_label, name, baseline) for name in titles}
    base = _attack_rows(by_label[baseline], {}) if baseline in by_label else {}
    base_passes = _passes(by_label[baseline]) if baseline in by_label else None
    class_names = {run.report.dataset.class_names for run in runs}
    different = different_settings([run_settings(of[0].report.config, without={"seed"}) for of in by_label.values()])
    return Comparison(
        rows=tuple(
            _row(members, {name: row for name, row in base.items() if label in alike[name]}, base_passes, different)
            for label, members in by_label.items()
        ),
        attacks=titles,
        baseline=baseline,
        class_names=class_names.pop() if len(class_names) == 1 else None,
        budget=by_value([(run.label, budget(run.report)) for run in runs]),
        environment=by_value([(run.label, machine_of(run.report)) for run in runs]),
        alike=alike,
        missing=(*missing, *_absent(by_label, missing)),
        pairs=pair_rows(by_label, baseline=baseline, titles=titles),
    )


def _alike(by_label: Mapping[str, Sequence[FinishedRun]], name: str, baseline: str | None) -> frozenset[str]:
    """See `Comparison.alike`; a baseline that does not have the evaluation counts as none."""
    found = {
        label: {tuple(conditions(run.report, name).items()) for run in runs if name in evaluations(run.report)}
        for label, runs in by_label.items()
    }
    expected = found.get(baseline or "") or set().union(*found.values())
    return frozenset(label for label, kinds in found.items() if kinds == expected and len(kinds) == 1)


def _spread(values: Sequence[float]) -> Spread:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(values=tuple(values), mean=statistics.fmean(values), std=std)


def _known_spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return _spread(known) if known else None


def _passes(members: Sequence[FinishedRun]) -> Spread | None:
    """Passes of the runs of a row, if all of them were trained here and counted them."""
    counts = [None if run.report.training is None else run.report.training.passes for run in members]
    return _known_spread(counts) if None not in counts else None


def _row(
    members: Sequence[FinishedRun], base: Mapping[str, AttackRow], base_passes: Spread | None, different: Sequence[str]
) -> Row:
    """One row; ``base`` and ``base_passes`` are the baseline's, ``different`` the settings that are not shared."""
    trained = [run.report.training for run in members if run.report.training is not None]
    passes = _passes(members)
    settings = run_settings(members[0].report.config)
    return Row(
        label=members[0].label,
        runs=tuple(members),
        attacks=_attack_rows(members, base),
        seconds=_known_spread(
            run.report.training.seconds + (run.report.calibration.seconds if run.report.calibration else 0)
            for run in members
            if run.report.training is not None
        ),
        passes=passes,
        price=passes.mean / base_passes.mean if passes and base_passes and base_passes.mean else None,
        peak_memory_bytes=_known_spread(training.peak_memory_bytes for training in trained),
        settings={name: value for name, value in settings.items() if name in different},
    )


def _attack_rows(runs: Sequence[FinishedRun], base: Mapping[str, AttackRow]) -> dict[str, AttackRow]:
    """Numbers of one row under every evaluation; ``base`` holds those of the baseline."""
    rows = {}
    for name in dict.fromkeys(name for run in runs for name in evaluations(run.report)):
        having = [run for run in runs if name in evaluations(run.report)]
        summaries = [evaluations(run.report)[name].summary for run in having]
        variances = [image_variances(summary) for summary in summaries]
        average = _spread([summary.average for summary in summaries])
        worst = _spread([summary.worst_class for summary in summaries])
        nsd = [summary.nsd for summary in summaries]
        reference = base.get(name)
        rho = None
        if reference is not None and reference.worst_class.mean > 0:
            changes = ((worst.mean, reference.worst_class.mean), (average.mean, reference.average.mean))
            rho = sum((new - old) / old for new, old in changes)
        accuracies = ([entry.accuracy for entry in summary.per_class] for summary in summaries)
        # Runs of one row may be of other classes, as long as nothing is drawn of them.
        classes = [_known_spread(of_runs) for of_runs in zip(*accuracies, strict=False)]
        rows[name] = AttackRow(
            seeds=tuple(run.seed for run in having),
            num_examples=tuple(summary.num_examples for summary in summaries),
            average=average,
            worst_class=worst,
            worst_30_percent=_spread([summary.worst_30_percent for summary in summaries]),
            nsd=_known_spread(nsd) if None not in nsd else None,
            rho=rho,
            image_variances={
                metric: statistics.fmean(variance[metric] for variance in variances) for metric in variances[0]
            },
            per_class=tuple(None if spread is None else spread.mean for spread in classes),
        )
    return rows


def _absent(by_label: Mapping[str, Sequence[FinishedRun]], missing: Sequence[MissingRun]) -> list[MissingRun]:
    """An entry for every seed that one row has and another lacks without an entry."""
    seeds = sorted({run.seed for runs in by_label.values() for run in runs})
    known: set[tuple[str, int | None]] = {(run.label, run.seed) for runs in by_label.values() for run in runs}
    known |= {(run.label, run.seed) for run in missing}
    return [
        MissingRun(label=label, seed=seed, reason="not among the given runs", state="not run")
        for label in by_label
        for seed in seeds
        if (label, seed) not in known
    ]


def different_settings(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Names of the settings that are not the same in all rows; one that a row lacks differs."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(name not in row or row[name] != rows[0].get(name) for row in rows)]


def image_variances(summary: FairnessSummary) -> dict[str, float]:
    """Binomial variance of one run's accuracies, by metric (our choice); NSD has no entry.

    ``p (1 - p) / n`` of the n images behind the number: all (average), those of the worst class, and for the mean of
    the k worst classes the sum over these classes, divided by ``k^2``. Which classes are the worst is taken as given.
    """
    classes = sorted((entry.accuracy, entry.count) for entry in summary.per_class if entry.accuracy is not None)
    kept = num_worst(len(classes))
    return {
        "average": _variance(summary.average, summary.num_examples),
        "worst_class": _variance(*classes[0]),
        "worst_30_percent": math.fsum(_variance(*entry) for entry in classes[:kept]) / kept**2,
    }


def _variance(accuracy: float, count: int) -> float:
    return accuracy * (1 - accuracy) / count
