"""Fairness numbers against loops, closed forms and the golden case."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file

from ham_hf.metrics import FairnessSummary, mean_of_worst, summarize, summarize_counts, wilson_interval
from tests.support.golden_data import GOLDEN, TOLERANCE
from tests.support.tables import cases


def naive_summary(flags: Sequence[bool], labels: Sequence[int], num_classes: int) -> dict[str, object]:
    """The numbers of FairnessSummary straight from their definitions."""
    accuracies: list[float | None] = []
    for wanted in range(num_classes):
        hits = [flag for flag, label in zip(flags, labels, strict=True) if label == wanted]
        accuracies.append(sum(hits) / len(hits) if hits else None)
    present = sorted(accuracy for accuracy in accuracies if accuracy is not None)
    macro = statistics.fmean(present)
    std = statistics.pstdev(present)
    return {
        "num_examples": len(labels),
        "average": sum(flags) / len(flags),
        "macro_average": macro,
        "worst_class": min(present),
        "worst_class_index": accuracies.index(min(present)),
        "best_class": max(present),
        "gap": max(present) - min(present),
        "worst_10_percent": statistics.fmean(present[: math.ceil(len(present) / 10)]),
        "worst_30_percent": statistics.fmean(present[: math.ceil(len(present) * 3 / 10)]),
        "std": std,
        "nsd": std / macro if macro else None,
        "missing_classes": tuple(index for index, accuracy in enumerate(accuracies) if accuracy is None),
        "accuracies": accuracies,
    }


def assert_equals_naive(summary: FairnessSummary, expected: dict[str, object]) -> None:
    accuracies = [entry.accuracy for entry in summary.per_class]
    assert accuracies == expected.pop("accuracies")
    for name, value in expected.items():
        actual = getattr(summary, name)
        assert actual == (pytest.approx(value, abs=1e-12) if isinstance(value, float) else value), name


def test_golden_class_accuracies_of_unbalanced_labels() -> None:
    case = load_file(GOLDEN / "metrics.safetensors")
    labels = case["in/labels"]
    for name in ("clean", "robust"):
        flags = case[f"in/pred_{name}"] == labels
        summary = summarize(flags, labels, 10)
        accuracies = torch.tensor([entry.accuracy for entry in summary.per_class], dtype=torch.float64)
        torch.testing.assert_close(accuracies, case[f"out/frl/class_{name}_acc"], **TOLERANCE)
        average = torch.tensor(summary.average, dtype=torch.float64)
        torch.testing.assert_close(average, case[f"out/cfa/{name}_acc"], **TOLERANCE)
        # The other convention, C * correct / N, is right for balanced labels alone, and these are not balanced.
        assert not torch.allclose(accuracies, case[f"out/cfa/class_{name}_acc"])


@pytest.mark.faults(quick=True)
@given(num_classes=st.integers(1, 12), data=st.data())
def test_equals_naive_loops_with_missing_classes(num_classes: int, data: st.DataObject) -> None:
    present = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1, unique=True))
    examples = data.draw(st.lists(st.tuples(st.booleans(), st.sampled_from(present)), min_size=1, max_size=60))
    flags, labels = zip(*examples, strict=True)
    summary = summarize(torch.tensor(flags), torch.tensor(labels), num_classes)
    assert_equals_naive(summary, naive_summary(flags, labels, num_classes))
    assert summary.average_low <= summary.average <= summary.average_high
    for entry in summary.per_class:
        assert (entry.accuracy is None) == (entry.count == 0)
        if entry.accuracy is not None:
            assert entry.low is not None
            assert entry.high is not None
            assert 0 <= entry.low <= entry.accuracy <= entry.high <= 1


@pytest.mark.parametrize(("correct", "count", "low", "high"), cases(__file__, "wilson_intervals.yaml"))
def test_wilson_interval_of_the_literature(correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(count - correct, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("correct", "count"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(correct: int, count: int) -> None:
    with pytest.raises(ValueError, match="0 <= correct <= count"):
        wilson_interval(correct, count)


@pytest.mark.parametrize(("num_classes", "kept"), [(1, 1), (3, 1), (4, 2), (10, 3), (11, 4), (20, 6), (100, 30)])
def test_worst_30_percent_counts_classes_exactly(num_classes: int, kept: int) -> None:
    """ceil(3 C / 10), and at least one."""
    accuracies = [index / num_classes for index in range(num_classes)]
    assert mean_of_worst(accuracies[::-1], 30) == pytest.approx(sum(accuracies[:kept]) / kept)


def test_bad_input_is_refused() -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="alike"):
        summarize(torch.tensor([True]), labels, 2)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        summarize(torch.tensor([True, True]), labels, 1)
    with pytest.raises(ValueError, match="no example"):
        summarize(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="2 correct counts for 1"):
        summarize_counts([1, 1], [2])
