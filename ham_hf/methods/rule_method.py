"""Methods with a class rule: their own (``--method cfa``), or a borrowed one (``--class_margin cfa``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from functools import cached_property
from typing import ClassVar, get_type_hints

from ham_hf.methods.base import Method, available
from ham_hf.methods.class_rule import ClassRule, RadiusRule, WeightRule
from ham_hf.methods.state import named_kinds
from ham_hf.settings import ConfigError, same_as, setting, setting_problems


@dataclass(frozen=True, kw_only=True)
class RuleMethod(Method):
    """A loss, plain PGD-AT unless a subclass says otherwise, and a class rule; its options are those of both."""

    rule_kind: ClassVar[type[ClassRule]]

    @cached_property
    def rule(self) -> ClassRule:
        """The class rule with its options."""
        return self.rule_kind(**{one.name: getattr(self, one.name) for one in fields(self.rule_kind)})

    @property
    def warmup_epochs(self) -> int:
        """Epochs of the plain loss."""
        return self.rule.warmup_epochs

    @property
    def radii(self) -> RadiusRule | None:
        return self.rule if isinstance(self.rule, RadiusRule) else None

    @property
    def weights(self) -> WeightRule | None:
        return self.rule if isinstance(self.rule, WeightRule) else None

    @property
    def state_keepers(self) -> tuple[ClassRule, ...]:
        """See `Method.state_keepers`: the rule, which bears the name of the method."""
        return (self.rule,)


def method_of(rule_kind: type[ClassRule], loss: type[Method] = Method) -> type[RuleMethod]:
    """The method, of the name of the rule, that trains with a class rule; `available` then finds it.

    Args:
        rule_kind: the rule.
        loss: a method without a rule, which says on which loss (`Method.loss`) and has its options.
    """
    hints = get_type_hints(rule_kind)
    options = [(one.name, hints[one.name], same_as(rule_kind, one.name)) for one in fields(rule_kind)]
    namespace = {
        "__doc__": rule_kind.__doc__,
        "__module__": rule_kind.__module__,
        "name": rule_kind.name,
        "summary": rule_kind.summary,
        "gates_averaging": rule_kind.gates_averaging,
        "rule_kind": rule_kind,
    }
    title = rule_kind.__name__.removesuffix("Rule")
    bases = (RuleMethod, loss) if loss is not Method else (RuleMethod,)
    return make_dataclass(title, options, bases=bases, namespace=namespace, frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Borrowing(Method):
    """A method that can borrow class radii and class weights from the class rules."""

    class_margin: str = setting("none", "class-wise method that gives each class its attack radius, such as cfa")
    class_weighting: str = setting("none", "class-wise method that gives each class its loss weight, such as dafa")
    class_rule_args: Mapping[str, object] = setting(
        {}, "options of --class_margin and --class_weighting, such as dafa_lambda=1.5"
    )

    def check(self, *, num_steps: int) -> None:
        lenders: list[tuple[str, str, type[ClassRule]]] = [
            ("class_margin", self.class_margin, RadiusRule),
            ("class_weighting", self.class_weighting, WeightRule),
        ]
        for option, name, base in lenders:
            lends = named_kinds(base)
            if name != "none" and name not in lends:
                why_not = f"as {name} has none to lend" if name in available() else f"and there is no method {name!r}"
                raise ValueError(f"--{option} {name}: expected none or one of {', '.join(lends)}, {why_not}")
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
        problems = [problem.removeprefix("--") for rule in self.rules for problem in setting_problems(rule)]
        if problems:
            raise ConfigError(f"--class_rule_args: {problem}" for problem in problems)
        off = {
            "class_margin": self.radii is not None and not self.radii.scales_radii,
            "class_weighting": self.weights is not None and not self.weights.weighs(self.loss),
        }
        for option in [option for option, is_off in off.items() if is_off]:
            given = " ".join(f"{key}={value}" for key, value in self.class_rule_args.items())
            raise ValueError(
                f"--{option} {getattr(self, option)} has no effect with --class_rule_args {given}; drop one of them"
            )
        super().check(num_steps=num_steps)

    @cached_property
    def _borrowed(self) -> dict[str, ClassRule]:
        found = {}
        for name in sorted({self.class_margin, self.class_weighting} - {"none"}):
            kind = named_kinds(ClassRule)[name]
            options = {one.name for one in fields(kind)} & self.class_rule_args.keys()
            found[name] = kind.lent(**{option: self.class_rule_args[option] for option in sorted(options)})
        return found

    @property
    def radii(self) -> RadiusRule | None:
        rule = self._borrowed.get(self.class_margin)
        return rule if isinstance(rule, RadiusRule) else None

    @property
    def weights(self) -> WeightRule | None:
        rule = self._borrowed.get(self.class_weighting)
        return rule if isinstance(rule, WeightRule) else None
