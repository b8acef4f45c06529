"""Made-up runs for the tests of leaderboard.html: seeds, another attack, an evaluated model, a hostile name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ham_hf.comparison.pairs import FinishedRun
from ham_hf.comparison.table import Comparison, MissingRun, compare
from ham_hf.intervals import intervals_of
from ham_hf.reporting.report import ThreatModelReport
from tests.support.comparison_reports import even, run_report
from tests.support.example_report import DIGITS


def ranked_run(
    label: str,
    correct: Sequence[int],
    *,
    seed: int = 0,
    epsilon: float = 8 / 255,
    trained: bool = True,
    names: Sequence[str] = DIGITS,
    attacks: Sequence[str] = ("pgd-20", "cw-20"),
    source: str | None = None,
    **changes: object,
) -> FinishedRun:
    """A run whose classes have that many of 20 images right under the first attack, and one less under the next."""
    counts = {
        name: even([max(0, right - place) for right in correct]) for place, name in enumerate(("", *attacks)) if name
    }
    report = run_report(
        {"clean": even([18] * len(correct)), **counts}, seed=seed, class_names=names, method=label, **changes
    )
    results = {
        name: dataclasses.replace(
            found,
            settings={**found.settings, "epsilon": epsilon} if name != "clean" else {},
            intervals=intervals_of(found.summary),
        )
        for name, found in report.results.items()
    }
    threat_model = ThreatModelReport(norm="linf", epsilon=epsilon)
    report = dataclasses.replace(report, results=results, threat_model=threat_model)
    if not trained:
        report = dataclasses.replace(report, training=None)
    return FinishedRun(label=label, seed=seed, report=report, source=source or f"outputs/{label}/seed{seed}")


def leaderboard_comparison(hostile: str = "</script><script>window.hacked = 1</script>") -> Comparison:
    """Four models attacked alike, one of them over three seeds, and one with half the radius; one id that failed."""
    names = [hostile, *(f"kind {index}" for index in range(1, 10))]
    runs = [
        *(ranked_run("ham", [9 + seed, 11, 12, 10, 13, 9, 14, 12, 11, 10], seed=seed, names=names, passes=2.1e6)
          for seed in range(3)),
        ranked_run("pgd_at", [3, 15, 16, 14, 15, 13, 16, 15, 12, 14], names=names, passes=3.9e6, seconds=150.0),
        ranked_run(hostile, [5, 9, 8, 12, 11, 7, 10, 9, 8, 6], names=names, seconds=61.0),
        ranked_run("resnet of a stranger", [6, 14, 13, 12, 11, 15, 9, 10, 12, 13], names=names, trained=False,
                   attacks=("pgd-20",), source="you/robust-resnet@v1"),
        ranked_run("gentle", [15, 16, 17, 18, 15, 16, 17, 18, 15, 16], names=names, epsilon=4 / 255, passes=2.0e6),
    ]  # fmt: skip
    missing = [MissingRun(label="you/gone", seed=None, reason="could not get report.json of you/gone", state="failed")]
    return compare(runs, baseline="pgd_at", missing=missing)
