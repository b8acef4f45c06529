"""Methods with a class rule: their own (``--method cfa``), or a borrowed one (``--class_margin cfa``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass
from functools import cached_property
from typing import Any, ClassVar, get_type_hints

from ham_hf.methods.base import Method, available
from ham_hf.methods.class_rule import ClassRule, RadiusRule, WeightRule
from ham_hf.methods.state import named_kinds
from ham_hf.settings import ConfigError, is_kind, same_as, setting, setting_problems

_LENDERS: dict[str, type[ClassRule]] = {"class_margin": RadiusRule, "class_weighting": WeightRule}
"""Options that name a class rule, and what they borrow from it."""


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
    shared = ("__doc__", "__module__", "name", "summary", "gates_averaging", "unrecorded")
    namespace = {"rule_kind": rule_kind, **{name: getattr(rule_kind, name) for name in shared}}
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

    def __post_init__(self) -> None:
        """Write out every option of the borrowed rules, so that the records of a run tell them all."""
        options = _lent_options([getattr(self, option) for option in _LENDERS], self.class_rule_args)
        object.__setattr__(self, "class_rule_args", options)

    def check(self, *, num_steps: int) -> None:
        for option, base in _LENDERS.items():
            name, lends = getattr(self, option), named_kinds(base)
            if name != "none" and name not in lends:
                why_not = f"as {name} has none to lend" if name in available() else f"and there is no method {name!r}"
                raise ValueError(f"--{option} {name}: expected none or one of {', '.join(lends)}, {why_not}")
        known = sorted(one.name for rule in self._borrowed.values() for one in fields(rule))
        for name in self.class_rule_args:
            if name not in known:
                expected = ", ".join(known) or "nothing without --class_margin or --class_weighting"
                raise ValueError(f"--class_rule_args {name}: expected {expected} (alone it drops those of a file)")
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
            rule = self._borrowed[getattr(self, option)]
            usual = asdict(rule.lent())
            given = " ".join(f"{key}={value}" for key, value in asdict(rule).items() if value != usual[key])
            raise ValueError(
                f"--{option} {getattr(self, option)} has no effect with --class_rule_args {given}; drop one of them"
            )
        super().check(num_steps=num_steps)

    @cached_property
    def _borrowed(self) -> dict[str, ClassRule]:
        kinds = named_kinds(ClassRule)
        given = {name: tuple(one) if isinstance(one, list) else one for name, one in self.class_rule_args.items()}
        return {
            name: kinds[name](**{one.name: given[one.name] for one in fields(kinds[name])})
            for name in sorted({self.class_margin, self.class_weighting} - {"none"})
        }

    @property
    def radii(self) -> RadiusRule | None:
        rule = self._borrowed.get(self.class_margin)
        return rule if isinstance(rule, RadiusRule) else None

    @property
    def weights(self) -> WeightRule | None:
        rule = self._borrowed.get(self.class_weighting)
        return rule if isinstance(rule, WeightRule) else None


def _lent_options(lenders: Sequence[object], given: Any, *, recorded: bool = False) -> Any:  # noqa: ANN401
    """Every option of the class rules of these names, those that are ``given`` included; see `as_recorded`."""
    if not isinstance(given, Mapping):
        return given  # for checks to refuse
    usual: dict[str, object] = {}
    for kind in [kind for name, kind in named_kinds(ClassRule).items() if name in lenders]:
        usual |= {**json.loads(json.dumps(asdict(kind.lent()))), **(kind.unrecorded if recorded else {})}
    # A whole number given for a number is that number, as in settings, which have a type.
    return {
        name: float(value) if isinstance(usual.get(name), float) and is_kind(value, float) else value
        for name, value in {**usual, **given}.items()
    }


def as_recorded(record: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """The record of a run, with options that it lacks as they were (`Stateful.unrecorded`), all of borrowed rules.

    ``prefix`` stands before the name of each option.
    """
    lenders, options = [record.get(prefix + option) for option in _LENDERS], f"{prefix}class_rule_args"
    method = available().get(str(record.get("method")), Method)
    found = {**{prefix + name: value for name, value in method.unrecorded.items()}, **record}
    if options in found:
        found[options] = _lent_options(lenders, found[options], recorded=True)
    return found
