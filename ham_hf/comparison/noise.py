"""Noise of a number that comes from having few test images: what one more right answer could have changed."""

from __future__ import annotations

import math

from ham_hf.metrics import FairnessSummary


def image_variances(summary: FairnessSummary) -> dict[str, float]:
    """Binomial variance of one run's accuracies, by metric; that of NSD is not known and has no entry.

    ``p (1 - p) / n`` of the n images that the number is made of: all of them (average), those of the worst class, and
    for the mean of the k worst classes the sum over these classes, divided by ``k^2``. Which classes are the worst is
    taken as given. Our choice.
    """
    classes = sorted((entry.accuracy, entry.count) for entry in summary.per_class if entry.accuracy is not None)
    kept = max(1, -(-30 * len(classes) // 100))  # as in ham_hf.metrics.mean_of_worst
    return {
        "average": _variance(summary.average, summary.num_examples),
        "worst_class": _variance(*classes[0]),
        "worst_30_percent": math.fsum(_variance(*entry) for entry in classes[:kept]) / kept**2,
    }


def _variance(accuracy: float, count: int) -> float:
    return accuracy * (1 - accuracy) / count
