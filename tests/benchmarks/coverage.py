"""Simulated coverage of the intervals of fairness numbers: how often a 95 % interval holds the true number.

    python -m tests.benchmarks.coverage [--simulations 2000]

Class accuracies are known, counts are drawn from them, and the intervals are made of the counts. Ten classes, with
accuracies that are spread (10 to 80 %), tied at the bottom (three at 20 %, the others 30 to 75 %), weak there (1, 3
and 5 %, the others 10 to 70 %), or calibrated (all 40 %), and 36, 100 or 1,000 test images of each class. One line per
profile and number of images.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

import numpy as np

from ham_hf.intervals import FairnessIntervals, fairness_intervals, spread_numbers, worst_class_interval

PROFILES = {
    "spread": np.linspace(0.1, 0.8, 10),
    "tied": np.concatenate([np.full(3, 0.2), np.linspace(0.3, 0.75, 7)]),
    "weak": np.array([0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
    "calibrated": np.full(10, 0.4),
}
COUNTS = (36, 100, 1000)
NAMES = tuple(field.name for field in fields(FairnessIntervals))


def coverage(accuracies: np.ndarray, count: int, *, simulations: int, seed: int = 0) -> dict[str, float]:
    """Share of simulations in which the interval holds the true number, by name of the number."""
    generator = np.random.default_rng(seed)
    worst_30, gap, std, nsd = spread_numbers(accuracies)
    true = {"worst_class": accuracies.min(), "worst_30_percent": worst_30, "gap": gap, "std": std, "nsd": nsd}
    held = dict.fromkeys(NAMES, 0)
    for number in range(simulations):
        correct = generator.binomial(count, accuracies).tolist()
        found = fairness_intervals(correct, [count] * len(correct), seed=number, repetitions=1000)
        for name in NAMES:
            low, high = getattr(found, name)
            # The true gap and deviation of equal accuracies are 0 but for rounding.
            held[name] += low - 1e-9 <= true[name] <= high + 1e-9
    return {name: times / simulations for name, times in held.items()}


def worst_class_coverage(accuracies: np.ndarray, count: int, *, simulations: int, seed: int = 0) -> float:
    """The same of the worst class alone, which needs no bootstrap and is fast."""
    generator, held = np.random.default_rng(seed), 0
    for _ in range(simulations):
        low, high = worst_class_interval(generator.binomial(count, accuracies).tolist(), [count] * len(accuracies))
        held += low <= accuracies.min() <= high
    return held / simulations


def main() -> None:
    """Print the coverage of every profile and number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    simulations = parser.parse_args().simulations
    sys.stdout.write("coverage in percent".ljust(24) + "".join(name.rjust(18) for name in NAMES) + "\n")
    for profile, accuracies in PROFILES.items():
        for count in COUNTS:
            found = coverage(accuracies, count, simulations=simulations)
            cells = "".join(f"{100 * found[name]:.1f}".rjust(18) for name in NAMES)
            sys.stdout.write(f"{profile}, {count} images".ljust(24) + cells + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
