"""Input and output of a method's inner maximization."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ham_hf.attacks import Attack
from ham_hf.methods.state import States


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Images, and how to attack them.

    Attributes:
        x: (N, C, H, W) pixels in [0, 1].
        y: (N,) labels.
        attack: threat model, steps and step size; radius and step may be per example.
        epoch: 0-based epoch.
        states: of the method and its rules, by name (`Method.state_keepers`); empty for held-out images.
        generator: source of all randomness, on the device of ``x``; None = torch's global one.
    """

    x: Tensor
    y: Tensor
    attack: Attack
    epoch: int
    states: States = field(default_factory=dict)
    generator: torch.Generator | None = None

    def training_rows(self, x: Tensor) -> TrainingRows:
        """All examples, with weight 1, in the rows ``x``."""
        return TrainingRows(x=x, y=self.y, weight=torch.ones_like(self.x[:, 0, 0, 0]))


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingRows:
    """The part of a batch that the outer minimization trains on: E examples in R rows.

    Attributes:
        x: (R, C, H, W) rows for the single training forward, in blocks of E: the adversarial images first, then
            whatever else the loss needs of the same examples. R may be 0.
        y: (E,) labels of the examples.
        weight: weight >= 0 of each example: (E,) in every term of the loss, or (T, E) in each of them.
        divided_by: (E,) what an example adds to the divisor of every term; None = its weight.
        with_adversarial: (A,) positions of the examples that have an adversarial image in ``x``, in its order; None =
            all have one.
        hard: (N,) bool over the whole batch for methods that mine, else None.
        wrong_at_start: (N,) bool over the whole batch, misclassified where the attack started, for methods that treat
            such examples differently, else None.
        early_logits: (N, num_classes) of the whole batch in mid-attack for methods that mine, else None.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    divided_by: Tensor | None = None
    with_adversarial: Tensor | None = None
    hard: Tensor | None = None
    wrong_at_start: Tensor | None = None
    early_logits: Tensor | None = None

    @property
    def adversarial_y(self) -> Tensor:
        """Labels (A,) of the first block of rows, the adversarial images."""
        return self.y if self.with_adversarial is None else self.y[self.with_adversarial]
