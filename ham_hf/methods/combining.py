"""Options by which methods are combined: the loss they are built on, and class radii and weights of other methods."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch

from ham_hf.attacks import ThreatModel
from ham_hf.methods.base import InnerAttack, Objective, available
from ham_hf.methods.losses import BASE_LOSSES, BaseLoss


@dataclass(frozen=True, kw_only=True)
class BuiltOnLoss(Objective):
    """A method that works with more than one loss."""

    base_loss: Literal["pgd_at", "trades", "mart"] = field(
        default="pgd_at", metadata={"help": "loss that the method is built on, with the attack that belongs to it"}
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "weight of the KL term of the loss; none = its own: 6 for TRADES, 5 for MART",
            "range": ">= 0",
        },
    )

    @property
    def loss(self) -> BaseLoss:
        """See `Objective.loss`."""
        kind = BASE_LOSSES[self.base_loss]
        return kind() if self.beta is None else kind(beta=self.beta)

    def check(self, *, num_steps: int) -> None:
        """See `Objective.check`."""
        super().check(num_steps=num_steps)
        if self.beta != type(self).beta and self.num_terms == 1:
            raise ValueError(
                f"--beta {self.beta} has no effect with --base_loss {self.base_loss}, which has no KL term"
            )


@dataclass(frozen=True, kw_only=True)
class Combinable(Objective):
    """A method that can borrow class radii and class weights from the class-wise methods."""

    class_margin: str = field(
        default="none",
        metadata={"help": "class-wise method whose radius of the attack for each class to use, such as cfa"},
    )
    class_weighting: str = field(
        default="none",
        metadata={"help": "class-wise method whose weight of the loss for each class to use, such as dafa"},
    )
    class_rule_args: Mapping[str, object] = field(
        default_factory=dict,
        metadata={"help": "options of --class_margin and --class_weighting, such as dafa_lambda=1.5"},
    )

    def check(self, *, num_steps: int) -> None:
        """See `Objective.check`."""
        lenders = [("class_margin", self.class_margin), ("class_weighting", self.class_weighting)]
        for option, name in lenders:
            lends = _lenders(option)
            if name != "none" and name not in lends:
                raise ValueError(f"--{option} {name}: expected none or one of {', '.join(lends)}, {_why_not(name)}")
        rules = [available()[name] for _, name in lenders if name != "none"]
        known = {one.name for rule in rules for one in fields(rule)} - {"base_loss", "beta"}
        known -= {one.name for one in fields(Combinable)}
        for name in self.class_rule_args:
            if name not in known:
                expected = ", ".join(sorted(known)) or "nothing without --class_margin or --class_weighting"
                raise ValueError(f"--class_rule_args {name}: expected {expected}")
        weighs = self.weighting.weighs_losses
        if self.loss.name not in weighs:
            raise ValueError(
                f"--class_weighting {self.class_weighting} weighs the terms of {' or '.join(weighs)}, but the loss of "
                f"this run is {self.loss.name}"
            )

    def check_parts(self) -> None:
        """See `Objective.check_parts`: refuse a lender whose options switch off what it lends, at any epoch."""
        last, counts = sys.maxsize, torch.ones(2, dtype=torch.float64)
        attack = InnerAttack(threat_model=ThreatModel(epsilon=1.0), num_steps=1, step_size=1.0)
        lent = {
            "class_margin": self.margin.class_attack(self.margin.initial_state(counts), attack, epoch=last),
            "class_weighting": self.weighting.class_weight(
                self.weighting.initial_state(counts), self.loss, epoch=last
            ),
        }
        for option, of_class in lent.items():
            name = getattr(self, option)
            if name != "none" and of_class is None:
                given = " ".join(f"{key}={value}" for key, value in self.class_rule_args.items())
                raise ValueError(f"--{option} {name} has no effect with --class_rule_args {given}; drop one of them")

    @cached_property
    def _rules(self) -> dict[str, Objective]:
        names = {self.class_margin, self.class_weighting} - {"none"}
        return {name: _make_rule(available()[name], self.class_rule_args) for name in sorted(names)}

    @property
    def margin(self) -> Objective:
        """See `Objective.margin`."""
        return self._rules.get(self.class_margin, self)

    @property
    def weighting(self) -> Objective:
        """See `Objective.weighting`."""
        return self._rules.get(self.class_weighting, self)


def _make_rule(kind: type[Objective], options: Mapping[str, object]) -> Objective:
    names = {one.name for one in fields(kind)}
    own: dict[str, Any] = {name: value for name, value in options.items() if name in names}
    return kind.as_rule(**own)


def _lenders(option: str) -> list[str]:
    lends = "gives_margin" if option == "class_margin" else "gives_weights"
    return [name for name, kind in available().items() if getattr(kind, lends)]


def _why_not(name: str) -> str:
    if name not in available():
        return f"and there is no method {name!r}"
    return f"as {name} has none to lend"
