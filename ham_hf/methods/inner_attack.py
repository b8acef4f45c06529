"""The attack of the inner maximization."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ham_hf.attacks import ThreatModel


@dataclass(frozen=True, eq=False, kw_only=True)
class InnerAttack:
    """The attack of the inner maximization.

    Attributes:
        threat_model: norm and radius.
        num_steps: K.
        step_size: length of a step in pixel units; a number or one per example (N,).
    """

    threat_model: ThreatModel
    num_steps: int
    step_size: float | Tensor

    def of_classes(self, radius: Tensor, step_size: Tensor, y: Tensor) -> InnerAttack:
        """The attack with the radius and the step (num_classes,) of the class of each example, labels ``y`` (N,)."""
        return InnerAttack(
            threat_model=replace(self.threat_model, epsilon=radius[y]),
            num_steps=self.num_steps,
            step_size=step_size[y],
        )

    def rows(self, rows: Tensor) -> InnerAttack:
        """The attack on the examples at the given positions, where radius or step are per example."""
        size = self.step_size
        size = size[rows] if isinstance(size, Tensor) and size.ndim else size
        return replace(self, threat_model=self.threat_model.rows(rows), step_size=size)
