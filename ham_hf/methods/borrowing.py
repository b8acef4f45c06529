"""Options by which a method borrows class radii and class weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ham_hf.methods.base import Method, available
from ham_hf.methods.class_rule import ClassRule, RadiusRule, WeightRule
from ham_hf.methods.state import named_kinds
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class Borrowing(Method):
    """A method that can borrow class radii and class weights from the class rules."""

    class_margin: str = setting(
        "none", "class-wise method whose radius of the attack for each class to use, such as cfa"
    )
    class_weighting: str = setting(
        "none", "class-wise method whose weight of the loss for each class to use, such as dafa"
    )
    class_rule_args: Mapping[str, object] = setting(
        {}, "options of --class_margin and --class_weighting, such as dafa_lambda=1.5"
    )

    def check(self, *, num_steps: int) -> None:
        super().check(num_steps=num_steps)
        lenders: list[tuple[str, str, type[ClassRule]]] = [
            ("class_margin", self.class_margin, RadiusRule),
            ("class_weighting", self.class_weighting, WeightRule),
        ]
        for option, name, base in lenders:
            lends = named_kinds(base)
            if name != "none" and name not in lends:
                raise ValueError(f"--{option} {name}: expected none or one of {', '.join(lends)}, {_why_not(name)}")
        known = {one.name for _, name, base in lenders if name != "none" for one in fields(named_kinds(base)[name])}
        for name in self.class_rule_args:
            if name not in known:
                expected = ", ".join(sorted(known)) or "nothing without --class_margin or --class_weighting"
                raise ValueError(f"--class_rule_args {name}: expected {expected}")
        if self.weights is not None and self.loss.name not in self.weights.weighs_losses:
            raise ValueError(
                f"--class_weighting {self.class_weighting} weighs the terms of "
                f"{' or '.join(self.weights.weighs_losses)}, but the loss of this run is {self.loss.name}"
            )

    def check_rules(self) -> None:
        """See `Method.check_rules`: refuse a rule whose options switch off what is borrowed of it."""
        off = {
            "class_margin": self.radii is not None and not self.radii.scales_radii,
            "class_weighting": self.weights is not None and not self.weights.weighs(self.loss),
        }
        for option in [option for option, is_off in off.items() if is_off]:
            given = " ".join(f"{key}={value}" for key, value in self.class_rule_args.items())
            raise ValueError(
                f"--{option} {getattr(self, option)} has no effect with --class_rule_args {given}; drop one of them"
            )

    @cached_property
    def _borrowed(self) -> dict[str, ClassRule]:
        names = {self.class_margin, self.class_weighting} - {"none"}
        return {name: _with_options(named_kinds(ClassRule)[name], self.class_rule_args) for name in sorted(names)}

    @property
    def radii(self) -> RadiusRule | None:
        rule = self._borrowed.get(self.class_margin)
        return rule if isinstance(rule, RadiusRule) else None

    @property
    def weights(self) -> WeightRule | None:
        rule = self._borrowed.get(self.class_weighting)
        return rule if isinstance(rule, WeightRule) else None


def _with_options(kind: type[ClassRule], options: Mapping[str, object]) -> ClassRule:
    names = {one.name for one in fields(kind)}
    own: dict[str, Any] = {name: value for name, value in options.items() if name in names}
    return kind.lent(**own)


def _why_not(name: str) -> str:
    if name not in available():
        return f"and there is no method {name!r}"
    return f"as {name} has none to lend"
