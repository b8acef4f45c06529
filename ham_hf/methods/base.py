"""Interface between the trainer and a training method.

For each batch a method answers two questions: which rows go through the one training forward (the inner
maximization, `Method.outer_batch`), and what each of them costs (the outer minimization, `Method.losses` and
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
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from ham_hf.attacks import Attack
from ham_hf.methods.class_rule import ClassRule, RadiusRule, WeightRule
from ham_hf.methods.losses import BaseLoss
from ham_hf.methods.state import Stateful, States, named_kinds


@dataclass(frozen=True, eq=False, kw_only=True)
class OuterBatch:
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


@dataclass(frozen=True, kw_only=True)
class Method(Stateful):
    """Base of all training methods: PGD adversarial training unless a method says otherwise."""

    gates_averaging: ClassVar[bool] = False
    """Whether fairness-gated weight averaging belongs to the published method."""

    def check(self, *, num_steps: int) -> None:
        """Check the options against the attack before anything expensive starts.

        Args:
            num_steps: K, the number of attack steps of the run.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """

    def check_rules(self) -> None:
        """Check the options of borrowed class rules, once each is known to be valid by itself.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """

    @property
    def depends_on_split(self) -> bool:
        """Whether an update depends on how its examples are split into processes and accumulation steps."""
        return False

    @property
    def tells_wrong_at_start(self) -> bool:
        """Whether outer batches of epochs that mine mark the examples misclassified where the attack starts."""
        return False

    @property
    def loss(self) -> BaseLoss:
        """The loss that the method is built on."""
        return BaseLoss()

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

    @property
    def parts(self) -> tuple[Stateful, ...]:
        """Parts that may keep state, each of another name: this method and its class rules."""
        return (self, *self.rules)

    def start_epochs(self, awp_start_epoch: int | None = None) -> dict[str, int]:
        """The 0-based epoch in which each part begins to differ from plain adversarial training, by its name.

        Args:
            awp_start_epoch: first epoch of the weight perturbation; None = there is none.
        """
        starts = {part.name: part.warmup_epochs for part in self.parts}
        return starts if awp_start_epoch is None else starts | {"awp": awp_start_epoch}

    def start_words(self, awp_start_epoch: int | None = None) -> dict[str, str]:
        """The same for people, who count from 1, with the flag, which counts from 0: "epoch 13 (--... 12)"."""
        words = {}
        for name, first in self.start_epochs(awp_start_epoch).items():
            part = next((part for part in self.parts if part.name == name), None)
            option = "awp_start_epoch"
            if part is not None:
                option = next((field.name for field in fields(part) if field.name.endswith("_start_epoch")), "")
            flag = f"--{option} {first}" if name in (self.name, "awp") else f"--class_rule_args {option}={first}"
            words[name] = f"epoch {first + 1} ({flag})" if option else f"epoch {first + 1}"
        return words

    # --- the inner maximization

    def outer_batch(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        attack: Attack,
        epoch: int,
        states: States,
        generator: torch.Generator | None = None,
    ) -> OuterBatch:
        """Run the inner maximization and choose the rows to train on.

        Args:
            model: the unwrapped pixel model; left as it was found (invariant 2).
            x: (N, C, H, W) pixels in [0, 1].
            y: (N,) labels.
            attack: threat model, steps and step size.
            epoch: 0-based epoch.
            states: class state of all parts.
            generator: source of all randomness, on the device of ``x``.
        """
        attack = self.attack_on(y, attack, epoch=epoch, states=states)
        x_adv = attack(
            model,
            x,
            y,
            start=self.loss.start(x, attack.threat_model, generator),
            loss_fn=self.loss.attack_loss(model, x),
        )
        return OuterBatch(x=self.loss.rows(x_adv, x), y=y, weight=torch.ones_like(x[:, 0, 0, 0]))

    def outer_batches(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Tensor, Tensor, torch.Generator]],
        *,
        attack: Attack,
        epoch: int,
        states: States,
    ) -> list[OuterBatch]:
        """`outer_batch` of each accumulation step of an update: images, labels and source of randomness.

        Returns:
            As many outer batches; a method may move rows from one to another, but not ``hard`` and ``early_logits``.
        """
        return [
            self.outer_batch(model, x, y, attack=attack, epoch=epoch, states=states, generator=generator)
            for x, y, generator in batches
        ]

    def attack_on(self, y: Tensor, attack: Attack, *, epoch: int, states: States) -> Attack:
        """The attack with the radius and step of each example's class, where the method has its own."""
        rule = self.radii
        of_class = None if rule is None else rule.class_attack(states[rule.name], attack, epoch=epoch)
        return attack if of_class is None else attack.of_classes(*of_class, y)

    # --- the outer minimization

    def losses(self, logits: Tensor, batch: OuterBatch) -> Tensor:
        """Value of each term for each example (T, E) from the logits (R, num_classes) of ``batch.x``, unweighted."""
        return self.loss.terms(logits, batch.y)

    def weigh(self, batch: OuterBatch, *, epoch: int, states: States) -> tuple[Tensor, Tensor]:
        """Weight of each term and example (T, E), and this batch's part of each term's divisor (T,).

        The loss of an update is, summed over its terms, sum(weight * term) / sum(divisor), both sums over all
        processes and accumulation steps (invariant 3).
        """
        rule = self.weights
        of_class = None if rule is None else rule.class_weight(states[rule.name], self.loss, epoch=epoch)
        weight = batch.weight.expand(self.num_terms, -1)
        divided_by = weight if batch.divided_by is None else batch.divided_by.expand_as(weight)
        if rule is not None and of_class is not None:
            of_example = of_class.to(weight.dtype)[:, batch.y]
            weight = weight * of_example
            if rule.divides_by_class_weight:
                divided_by = divided_by * of_example
        # Numbers, not a tensor of them: that would have to be copied to the device, and be waited for.
        scaled = [row * scale for row, scale in zip(weight, self.loss.scales, strict=True)]
        return torch.stack(scaled), divided_by.sum(1)


def available() -> dict[str, type[Method]]:
    """Every imported training method by name, in alphabetical order."""
    return named_kinds(Method)
