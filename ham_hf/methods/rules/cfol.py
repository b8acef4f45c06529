"""CFOL: class-focused online learning (Pethick et al., TMLR 2023), on PGD-AT.

Exp3 over classes: a class whose adversarial examples are misclassified is drawn more often. A class is drawn from
gamma base + (1 - gamma) softmax(w), then one of its examples. ``cfol_as="weight"`` takes every example once and
weighs its loss by that mixture instead, anew for every update; it is the form that other methods can borrow.

Where the published code differs: it changes the probabilities of the sampler after every batch. Ours draws an epoch
ahead, so that a run can be resumed within it: the probabilities, and the division by them, stay for an epoch, while
the log-weights move with every update. As a weight it still draws classes from the base (the same where they are of
equal size); both divide by the base probability. It keeps log-weights in float32 and cannot leave out a class; here
a class without training images has probability 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ham_hf.attacks import predicted
from ham_hf.methods.class_rule import ClassRule, WeightRule
from ham_hf.methods.losses import BaseLoss
from ham_hf.methods.rule_method import method_of
from ham_hf.methods.state import State, class_sums
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class CFOLRule(WeightRule):
    """Draw, or weigh, classes by how often their adversarial examples are misclassified."""

    name: ClassVar[str] = "cfol"
    summary: ClassVar[str] = "class-focused online learning, a class sampler (Pethick et al., 2023)"
    uses_class_counts: ClassVar[bool] = True

    cfol_as: Literal["sampler", "weight"] = setting(
        "sampler", "draw classes by the probabilities, or weigh the loss by them"
    )
    cfol_gamma: float = setting(0.5, "share of the base distribution in the probabilities", above=0, at_most=1)
    cfol_eta: float = setting(1e-5, "log-weight that a misclassified example adds to its class", above=0)
    cfol_base: Literal["uniform", "empirical"] = setting(
        "uniform", "base distribution: all classes alike, or by their training images"
    )

    @classmethod
    def lent(cls, **options: Any) -> ClassRule:  # noqa: ANN401
        """A weight, unless the options say otherwise."""
        return cls(**{"cfol_as": "weight", **options})

    @property
    def draws_classes(self) -> bool:
        """Whether the rule is used as a sampler."""
        return self.cfol_as == "sampler"

    def weighs(self, loss: BaseLoss) -> bool:
        """Whether the loss allows it and the rule is used as a weight."""
        return super().weighs(loss) and self.cfol_as == "weight"

    def initial_state(self, class_counts: Tensor) -> State:
        """Log-weights, the base, and the probabilities in force for this epoch."""
        weight = class_counts if self.cfol_base == "empirical" else (class_counts > 0).to(class_counts)
        state = {"log_weight": torch.zeros_like(class_counts), "base": weight / weight.sum()}
        state["probabilities"] = mixture(state["log_weight"], state["base"], self.cfol_gamma)
        return state

    def before_epoch(self, state: State, *, epoch: int) -> None:
        """Settle the probabilities of this epoch's draws."""
        state["probabilities"] = mixture(state["log_weight"], state["base"], self.cfol_gamma)

    def observe(self, logits: Tensor, y: Tensor, *, epoch: int) -> Tensor:
        """Count the misclassified adversarial examples of each class."""
        return class_sums(predicted(logits) != y, y, logits.shape[1])

    def after_update(self, state: State, sums: Tensor, *, epoch: int) -> None:
        """Divide by the probability that the examples were drawn with."""
        drawn_with = state["probabilities"] if self.cfol_as == "sampler" else state["base"]
        state["log_weight"] += torch.where(drawn_with > 0, self.cfol_eta * sums / drawn_with, 0.0)

    def class_probabilities(self, state: State) -> Tensor | None:
        return state["probabilities"] if self.cfol_as == "sampler" else None

    def class_weight(self, state: State, loss: BaseLoss, *, epoch: int) -> Tensor | None:
        """Weigh every term by the mixture times the number of classes."""
        if not self.weighs(loss):
            return None
        num_present = (state["base"] > 0).sum()
        weight = num_present * mixture(state["log_weight"], state["base"], self.cfol_gamma)
        return weight.expand(loss.num_terms, -1)


CFOL = method_of(CFOLRule)
"""PGD-AT with the sampler, or the class weights, of CFOL."""


def mixture(log_weight: Tensor, base: Tensor, gamma: float) -> Tensor:
    """Probabilities gamma base + (1 - gamma) softmax(log_weight), (C,), of the classes whose base is not 0."""
    return gamma * base + (1 - gamma) * log_weight.masked_fill(base == 0, float("-inf")).softmax(0)
