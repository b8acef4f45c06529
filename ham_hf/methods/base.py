"""Interface between the trainer and a training method.

For each batch a method answers two questions: which rows go through the one training forward (the inner
maximization, `Method.rows_to_train_on`), and what each of them costs (the outer minimization, `Method.losses` and
`Method.weigh`). The trainer does the rest: division by the sums over all processes and accumulation steps, backward,
and the update.

Class rules (`ham_hf.methods.class_rule`) treat classes differently; a method at most uses the radii of one
(`Method.radii`) and the weights of one (`Method.weights`). A method keeps state only for the inner maximization
(`ham_hf.methods.state`).

A method is one frozen dataclass in one file; its fields are its command-line options, its `name` the value of
``--method``. Importing the file registers it: `available` finds every subclass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ham_hf.attacks import LossFn
from ham_hf.methods.batch import Batch, TrainingRows
from ham_hf.methods.class_rule import ClassRule, RadiusRule, WeightRule
from ham_hf.methods.losses import BASE_LOSSES, BaseLoss
from ham_hf.methods.state import Stateful, States, named_kinds
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class Method(Stateful):
    """Base of all training methods: PGD adversarial training unless a method says otherwise."""

    loss_kind: ClassVar[type[BaseLoss]] = BaseLoss

    def check(self, *, num_steps: int) -> None:
        for rule in self.rules:
            rule.check(num_steps=num_steps)

    @property
    def depends_on_split(self) -> bool:
        """Whether an update depends on how its examples are split into processes and accumulation steps."""
        return False

    @property
    def tells_wrong_at_start(self) -> bool:
        """Whether epochs that mine mark the examples misclassified where the attack starts."""
        return False

    @property
    def loss(self) -> BaseLoss:
        """The loss that the method is built on: a `loss_kind`, with the method's ``beta`` if it has that option."""
        beta = getattr(self, "beta", None)
        return self.loss_kind() if beta is None else self.loss_kind(beta=beta)

    @property
    def num_terms(self) -> int:
        """T, the number of terms of the loss."""
        return self.loss.num_terms

    @property
    def radii(self) -> RadiusRule | None:
        """The class rule that gives the radius of each class; None attacks all alike."""
        return None

    @property
    def weights(self) -> WeightRule | None:
        """The class rule that weighs the classes; None weighs all alike."""
        return None

    @property
    def rules(self) -> tuple[ClassRule, ...]:
        """The class rules, each once."""
        return tuple({rule.name: rule for rule in (self.radii, self.weights) if rule is not None}.values())

    def flag_of(self, rule: ClassRule) -> str:
        """How a command line asks for one of `rules`."""
        if rule.name == self.name:
            return f"--method {rule.name}"
        borrowed = self.weights is not None and self.weights.name == rule.name
        return f"--class_{'weighting' if borrowed else 'margin'} {rule.name}"

    @property
    def state_keepers(self) -> tuple[Stateful, ...]:
        """This method and its class rules, each by its own name: all that may keep state."""
        return (self, *self.rules)

    @property
    def settled_epoch(self) -> int:
        """The 0-based epoch from which on it does the same in every epoch, but for what its state says."""
        return max(one.warmup_epochs for one in self.state_keepers)

    def starts(self, awp_start_epoch: int | None = None) -> dict[str, tuple[int, str]]:
        """The 0-based epoch in which each of them, and the weight perturbation "awp" if there is one, begins.

        And the same in words, counted from 1, with the flag, which counts from 0: "epoch 13 (--... 12)".
        """
        begins = {one.name: (one.warmup_epochs, one.start_option()) for one in self.state_keepers}
        if awp_start_epoch is not None:
            begins["awp"] = (awp_start_epoch, "awp_start_epoch")
        found = {}
        for name, (first, option) in begins.items():
            flag = f"--{option} {first}" if name in (self.name, "awp") else f"--class_rule_args {option}={first}"
            found[name] = (first, f"epoch {first + 1} ({flag})" if option else f"epoch {first + 1}")
        return found

    # --- the inner maximization

    def rows_of_update(self, model: nn.Module, batches: Sequence[Batch]) -> list[TrainingRows]:
        """`rows_to_train_on` of each accumulation step of an update.

        A method may move rows from one entry to another, but not ``hard``, ``wrong_at_start`` and ``early_logits``.
        """
        return [self.rows_to_train_on(model, batch) for batch in batches]

    def rows_to_train_on(self, model: nn.Module, batch: Batch) -> TrainingRows:
        """Attack a batch with the radii of its classes, and choose the rows to train on.

        The model is unwrapped, and left as it was found (`ham_hf.attacks.attack_mode`).
        """
        return self.inner_maximization(model, self.with_class_radii(batch))

    def with_class_radii(self, batch: Batch) -> Batch:
        """The batch with the radius and step of each example's class, where the method has its own."""
        rule = self.radii
        of_class = (
            None if rule is None else rule.class_attack(batch.states[rule.name], batch.attack, epoch=batch.epoch)
        )
        return batch if of_class is None else replace(batch, attack=batch.attack.of_classes(*of_class, batch.y))

    def inner_maximization(self, model: nn.Module, batch: Batch) -> TrainingRows:
        """The rows to train on after an attack on the batch as it is."""
        start, loss_fn = self.start_and_loss(model, batch)
        x_adv = batch.attack(model, batch.x, batch.y, start=start, loss_fn=loss_fn)
        return batch.training_rows(self.loss.rows(x_adv, batch.x))

    def start_and_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, LossFn]:
        """Start (N, C, H, W) of the attack of the method's loss, and the quantity that it increases."""
        start = self.loss.start(batch.x, batch.attack.threat_model, batch.generator)
        return start, self.loss.attack_loss(model, batch.x)

    # --- the outer minimization

    def losses(self, logits: Tensor, rows: TrainingRows) -> Tensor:
        """Value of each term for each example (T, E) from the logits (R, num_classes) of ``rows.x``, unweighted."""
        return self.loss.terms(logits, rows.y, rows.with_adversarial)

    def weigh(self, rows: TrainingRows, *, epoch: int, states: States) -> tuple[Tensor, Tensor]:
        """Weight of each term and example (T, E), and this batch's part of each term's divisor (T,).

        The loss of an update is, summed over its terms, sum(weight * term) / sum(divisor), both sums over all
        processes and accumulation steps (`ham_hf.training.train_step`).
        """
        rule = self.weights
        of_class = None if rule is None else rule.class_weight(states[rule.name], self.loss, epoch=epoch)
        weight = rows.weight.expand(self.num_terms, -1)
        divided_by = weight if rows.divided_by is None else rows.divided_by.expand_as(weight)
        if rule is not None and of_class is not None:
            of_example = of_class.to(weight.dtype)[:, rows.y]
            weight = weight * of_example
            if rule.divides_by_class_weight:
                divided_by = divided_by * of_example
        # Numbers, not a tensor of them: that would have to be copied to the device, and be waited for.
        scaled = [row * scale for row, scale in zip(weight, self.loss.scales, strict=True)]
        return torch.stack(scaled), divided_by.sum(1)


@dataclass(frozen=True, kw_only=True)
class BuiltOnLoss(Method):
    """A method that works with more than one loss."""

    base_loss: Literal["pgd_at", "trades", "mart"] = setting(
        "pgd_at", "loss that the method is built on, with the attack that belongs to it"
    )
    beta: float | None = setting(
        None, "weight of the KL term of the loss; none = its own: 6 for TRADES, 5 for MART", at_least=0
    )

    @property
    def loss(self) -> BaseLoss:
        kind = BASE_LOSSES[self.base_loss]
        return kind() if self.beta is None else kind(beta=self.beta)

    def check(self, *, num_steps: int) -> None:
        super().check(num_steps=num_steps)
        if self.beta != type(self).beta and self.num_terms == 1:
            raise ValueError(
                f"--beta {self.beta} has no effect with --base_loss {self.base_loss}, which has no KL term"
            )


@dataclass(frozen=True, kw_only=True)
class TradesOrPGDAT(BuiltOnLoss):
    """A method that works with TRADES and PGD-AT."""

    base_loss: Literal["pgd_at", "trades"] = setting(
        "trades", "loss that the method is built on, with the attack that belongs to it"
    )


def available() -> dict[str, type[Method]]:
    """Every imported training method by name, in alphabetical order."""
    return named_kinds(Method)
