"""Made-up runs for the tests of comparisons: a RunReport with chosen counts per class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from markdown_it import MarkdownIt

from ham_hf.comparison.pairs import FinishedRun
from ham_hf.evaluation.verdicts import verdicts_of
from ham_hf.metrics import summarize_counts
from ham_hf.reporting.report import RunReport
from ham_hf.reporting.run_report import attack_report, verdict_report
from tests.support.example_report import DIGITS, attack_result, make_report

NAMES = ("a", "b", "c", "d")
COUNT = 100
METRICS = ("average", "worst_class", "worst_30_percent")
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


def run(label: str, results: Mapping[str, Counts], *, seed: int = 0, **changes: object) -> FinishedRun:
    report = run_report(results, seed=seed, **{"method": label, **changes})
    return FinishedRun(label=label, seed=seed, report=report, source=f"outputs/{label}/seed{seed}")


def even(correct: Sequence[int], count: int = 20) -> Counts:
    return correct, [count] * len(correct)


CLEAN = even([18, 17, 20, 16, 19, 20, 15, 18, 17, 20])


def by_seeds(label: str, *by_seed: Sequence[int], **changes: object) -> list[FinishedRun]:
    """Runs of one label with three classes of 20 images, one per list of correct counts."""
    return [
        run(label, {"clean": even([20] * 3), "pgd-20": even(right)}, seed=seed, class_names=NAMES[:3], **changes)
        for seed, right in enumerate(by_seed)
    ]


def judged_run(label, correct, *, seed=0, swap=0, kept=True, seen=COUNT, epsilon=8 / 255):
    """A run whose verdict is right on the first ``correct`` images of each class; ``swap`` images are others.

    The attack saw the first ``seen`` images of each class.
    """
    labels = torch.arange(len(NAMES)).repeat_interleave(COUNT)
    place = torch.arange(COUNT).repeat(len(NAMES))
    limit = torch.tensor(correct)[labels]
    right = (place >= swap) & (place < limit + swap)
    wrong = (labels + 1) % len(NAMES)
    settings = {"norm": "linf", "epsilon": epsilon, "num_steps": 20, "step_size": 2 / 255, "seed": seed}
    settings |= {"num_examples": seen * len(NAMES), "subset": seen < COUNT}
    attacked = attack_result("pgd-20", settings, torch.where(right, labels, wrong)[place < seen], labels[place < seen])
    results = {
        "clean": attack_result("clean", {}, labels, labels),
        "pgd-20": dataclasses.replace(attacked, indices=(place < seen).nonzero().squeeze(1)),
    }
    verdicts, counts = verdicts_of(results, NAMES), [COUNT] * len(NAMES)
    by_class = {"clean": (counts, counts), "pgd-20": (correct, counts)}
    report = run_report(by_class, seed=seed, class_names=NAMES, method=label)
    report = dataclasses.replace(
        report,
        results=dict(report.results) | {"pgd-20": attack_report(results["pgd-20"], len(NAMES))},
        verdict=verdict_report(verdicts, seconds=1.0) if kept else None,
    )
    return FinishedRun(label=label, seed=seed, report=report, source=label, verdicts=verdicts if kept else None)


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """The first table under each heading, as a Markdown reader sees it: rows of cells, "**" kept."""
    tables, heading, rows = {}, "", []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "inline" and before.type == "heading_open":
            heading = token.content
        elif token.type == "tr_open":
            rows = tables.setdefault(heading, [])
            rows.append([])
        elif token.type == "inline" and before.type in ("td_open", "th_open"):
            rows[-1].append(token.content)
    return tables
