"""What the trainer knows of a training method.

A method answers two questions for each batch: which rows go through the one training forward (the inner
maximization, `Objective.outer_batch`), and what each of them costs (the outer minimization, `Objective.losses`).
Everything else (normalizing over all processes and accumulation steps, backward, the update) is the trainer's.

A method is one frozen dataclass in one file; its fields are its command-line options, its `name` the value of
``--method``. Importing the file is all that is needed: `available` finds every subclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel, cross_entropy, pgd


@dataclass(frozen=True, eq=False, kw_only=True)
class InnerAttack:
    """The attack of the inner maximization.

    Attributes:
        threat_model: norm and radius.
        num_steps: K.
        step_size: length of a step in pixel units.
    """

    threat_model: ThreatModel
    num_steps: int
    step_size: float


@dataclass(frozen=True, eq=False, kw_only=True)
class OuterBatch:
    """The part of a batch that the outer minimization trains on.

    Attributes:
        x: (R, C, H, W) rows for the single training forward; R may be 0.
        y: (R,) labels of those rows.
        weight: (R,) weight >= 0 of each row's loss. The loss of an update is sum(weight * loss) / sum(weight)
            over the rows of all processes and accumulation steps (invariant 3).
        hard: (N,) bool over the whole batch for methods that mine, else None. For the log only.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    hard: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all training methods: plain PGD adversarial training unless a method says otherwise."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    """One line for ``--help`` and the model card."""

    def check(self, *, num_steps: int) -> None:
        """Check the options against the attack before anything expensive starts.

        Args:
            num_steps: K, the number of attack steps of the run.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """

    @property
    def warmup_epochs(self) -> int:
        """Number of first epochs in which the method is still plain PGD-AT; 0 if there are none."""
        return 0

    def outer_batch(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        attack: InnerAttack,
        epoch: int,
        generator: torch.Generator | None = None,
    ) -> OuterBatch:
        """Run the inner maximization and choose the rows to train on.

        Args:
            model: the unwrapped pixel model; left as it was found (invariant 2).
            x: (N, C, H, W) pixels in [0, 1].
            y: (N,) labels.
            attack: threat model, steps and step size.
            epoch: 0-based epoch.
            generator: source of all randomness, on the device of ``x``.
        """
        x_adv = pgd(
            model,
            x,
            y,
            threat_model=attack.threat_model,
            num_steps=attack.num_steps,
            step_size=attack.step_size,
            generator=generator,
        )
        return OuterBatch(x=x_adv, y=y, weight=torch.ones_like(x[:, 0, 0, 0]))

    def losses(self, logits: Tensor, batch: OuterBatch) -> Tensor:
        """Loss of each row (R,) from the logits (R, num_classes) of the training forward on ``batch.x``."""
        return cross_entropy(logits, batch.y)


def available() -> dict[str, type[Objective]]:
    """Every imported training method by name, in the order of definition."""
    found: dict[str, type[Objective]] = {}
    pending = Objective.__subclasses__()
    while pending:
        kind = pending.pop(0)
        found[kind.name] = kind
        pending.extend(kind.__subclasses__())
    return found
