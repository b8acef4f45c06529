"""Class rules: how training treats classes differently, by the radius of their attack or the weight of their loss.

A class rule keeps state of each class and turns it into radii (`RadiusRule`), weights (`WeightRule`) or both. A
method is built with one (`ham_hf.methods.rule_method`: ``--method cfa``), or borrows one (``--class_margin``,
``--class_weighting``). Besides the hooks of `ham_hf.methods.state`, in the order of a run:

    wants_held_out, held_out_sums -> after_held_out   after `before_epoch`, on held-out images
    class_probabilities                               every epoch, and again where a run resumes within it
    class_attack                                      every batch, and for the log at the end of an epoch: radius and
                                                      step of each class
    preview -> before_update                          every update, where `WeightRule.wants_preview`: sums over the
                                                      rows about to be trained on
    class_weight                                      every batch: weight of each class in each term of the loss

The trainer adds sums over all batches and processes before a hook sees them.

A rule is one frozen dataclass in one file; its fields are its options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ham_hf.attacks import Attack
from ham_hf.methods.batch import Batch
from ham_hf.methods.losses import BASE_LOSSES, BaseLoss
from ham_hf.methods.state import State, Stateful


@dataclass(frozen=True, kw_only=True)
class ClassRule(Stateful):
    """Base of all class rules."""

    num_held_out_sums: ClassVar[int] = 0
    """S, the sums of each class that the rule takes over held-out images, and cannot do without."""
    uses_class_counts: ClassVar[bool] = False
    """Whether `initial_state` uses how many training images a class has; streams may not know it (NaN)."""

    @classmethod
    def lent(cls, **options: Any) -> ClassRule:  # noqa: ANN401 (fields of any type)
        """The rule with these options, for a method that borrows its radii or weights."""
        return cls(**options)

    @property
    def draws_classes(self) -> bool:
        """Whether the rule has a sampler (`class_probabilities`)."""
        return False

    def wants_held_out(self, epoch: int) -> bool:
        """Whether `held_out_sums` are to be taken before this epoch."""
        return False

    def held_out_sums(self, model: nn.Module, batch: Batch, *, loss: BaseLoss, num_classes: int) -> Tensor:
        """Sums over a batch of held-out images (S, num_classes), of `class_sums`, the model in evaluation mode.

        ``loss`` is that of the method that trains.
        """
        raise NotImplementedError(f"{self.name} takes no sums over held-out images")

    def after_held_out(self, state: State, sums: Tensor, *, epoch: int) -> None:
        """Take in the sums (S, num_classes) over all held-out images."""

    def class_probabilities(self, state: State) -> Tensor | None:
        """Probability of each class (num_classes,) in the draws of this epoch; None takes every example once.

        Asked for again where a run resumes: only `before_epoch` and `after_held_out` may change it.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class RadiusRule(ClassRule):
    """A class rule that gives each class a radius."""

    @property
    def scales_radii(self) -> bool:
        """Whether the options leave the radii on."""
        return True

    def class_attack(self, state: State, attack: Attack, *, epoch: int) -> tuple[Tensor, Tensor] | None:
        """Radius and step size of each class, (num_classes,) each, in pixel units; None leaves the attack alone."""
        raise NotImplementedError(f"{self.name} does not define the radius of a class")


@dataclass(frozen=True, kw_only=True)
class WeightRule(ClassRule):
    """A class rule that gives each class a weight in the loss."""

    weighs_losses: ClassVar[tuple[str, ...]] = tuple(BASE_LOSSES)
    """Names of the losses that the weights make sense for."""
    wants_preview: ClassVar[bool] = False
    """Whether the rule sees the rows of an update before it weighs them (`preview`)."""
    divides_by_class_weight: ClassVar[bool] = False
    """Whether a term is divided by the sum of its weights, class weights included; else by that of the examples'."""

    def weighs(self, loss: BaseLoss) -> bool:
        """Whether the options leave the weights on for this loss."""
        return loss.name in self.weighs_losses

    def preview(self, logits: Tensor, y: Tensor, num_classes: int) -> Tensor:
        """Sums over rows about to be trained on, from their adversarial training logits (E, num_classes)."""
        raise NotImplementedError(f"{self.name} takes no sums before an update")

    def before_update(self, state: State, sums: Tensor) -> None:
        """Take in the sums of `preview` over all rows of the update."""

    def class_weight(self, state: State, loss: BaseLoss, *, epoch: int) -> Tensor | None:
        """Weight of each class in each term of ``loss`` (T, num_classes), 1 = plain; None leaves all at 1."""
        raise NotImplementedError(f"{self.name} does not define the weight of a class")


@dataclass(frozen=True, kw_only=True)
class FirstTermRule(WeightRule):
    """A rule that weighs the first term of the loss alone, by ``state["weight"]``, after its warm-up."""

    def class_weight(self, state: State, loss: BaseLoss, *, epoch: int) -> Tensor | None:
        if epoch < self.warmup_epochs:
            return None
        return torch.stack([state["weight"], *[torch.ones_like(state["weight"])] * (loss.num_terms - 1)])
