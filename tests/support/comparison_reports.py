"""Made-up runs for the tests of comparisons: a RunReport with chosen counts per class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ham_hf.comparison.table import Run
from ham_hf.metrics import summarize_counts
from ham_hf.reporting.report import RunReport
from tests.support.example_report import DIGITS, make_report

Counts = tuple[Sequence[int], Sequence[int]]
"""Correct and all examples of each class."""


def run_report(
    results: Mapping[str, Counts],
    *,
    seed: int = 0,
    class_names: Sequence[str] = DIGITS,
    seconds: float = 90.0,
    memory: int | None = 600_000_000,
    passes: float | None = None,
    **config: object,
) -> RunReport:
    plain = make_report(class_names=class_names, attacks=tuple(results))
    attacks = {
        name: dataclasses.replace(plain.results[name], summary=summarize_counts(correct, counts))
        for name, (correct, counts) in results.items()
    }
    return dataclasses.replace(
        plain,
        results=attacks,
        dataset=dataclasses.replace(plain.dataset, num_test=max(sum(counts) for _, counts in results.values())),
        training=dataclasses.replace(plain.training, seconds=seconds, peak_memory_bytes=memory, passes=passes),
        config={**plain.config, "seed": seed, **config},
        seeds={"seed": seed},
    )


def run(label: str, results: Mapping[str, Counts], *, seed: int = 0, **changes: object) -> Run:
    report = run_report(results, seed=seed, **{"method": label, **changes})
    return Run(label=label, seed=seed, report=report, source=f"outputs/{label}/seed{seed}")


def even(correct: Sequence[int], count: int = 20) -> Counts:
    return correct, [count] * len(correct)
