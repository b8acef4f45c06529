"""The calibration in a report: its numbers, and the sentences that the card says about it."""

from __future__ import annotations

from dataclasses import dataclass

from ham_hf.evaluation.calibration import Calibration, FrontierPoint
from ham_hf.reporting.formats import percent


@dataclass(frozen=True, kw_only=True)
class CalibrationReport(Calibration):
    """Class shifts that were folded into a model, and what they cost.

    Attributes:
        max_average_drop: the drop that F was chosen by; None if F was given.
        images: the images that the shifts were found on, in words that follow "found on".
        seen_in_training: whether the model was trained on them.
        seconds: duration.
        tags: tags of the calibrated model's card.
    """

    max_average_drop: float | None
    images: str
    seen_in_training: bool
    seconds: float
    tags: tuple[str, ...] = ()

    def point(self, fairness: float) -> FrontierPoint:
        """The frontier's point at F.

        Raises:
            ValueError: if it was not measured.
        """
        for point in self.frontier:
            if point.fairness == fairness:
                return point
        raise ValueError(f"the frontier has no point at {fairness}")


def exchange_sentence(report: CalibrationReport) -> str:
    """What the shifts cost and gained, in one sentence."""
    before, after = report.point(0.0), report.point(report.fairness)
    if report.fairness == 0:
        return "Fairness 0 leaves the model unchanged."
    lost = 100 * (before.average - after.average)
    averages = f"{percent(before.average)} % before, {percent(after.average)} % after"
    price = f"for {lost:.1f} points of the average" if lost >= 0 else f"and the average rose by {-lost:.1f} points"
    return (
        f"Fairness {report.fairness:g} took the worst class from {percent(before.worst_class)} % to "
        f"{percent(after.worst_class)} % and the worst 30 % of the classes from "
        f"{percent(before.worst_30_percent)} % to {percent(after.worst_30_percent)} %, {price} ({averages}), "
        "counted on images that the shifts were not found on."
    )


def training_images_note(report: CalibrationReport) -> str | None:
    """The warning that goes with shifts found on training images; None for others."""
    if not report.seen_in_training:
        return None
    return (
        f"The class shifts were found on images that the model was trained on ({report.images}): its accuracy on them "
        "is higher than on new images, and not equally so in every class, so the shifts may be wrong for new images, "
        "and the frontier is too optimistic."
    )
