"""Methods that are a loss with a class rule: ``--method cfa``."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, make_dataclass
from functools import cached_property
from typing import Any, ClassVar, get_type_hints

from ham_hf.methods.base import Method
from ham_hf.methods.class_rule import ClassRule, RadiusRule, WeightRule


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
    def parts(self) -> tuple[ClassRule, ...]:
        """See `Method.parts`: the rule, which bears the name of the method."""
        return (self.rule,)

    @property
    def rules(self) -> tuple[ClassRule, ...]:
        return (self.rule,)


def method_of(rule_kind: type[ClassRule], loss: type[Method] = Method) -> type[RuleMethod]:
    """The method, of the name of the rule, that trains with a class rule; `available` then finds it.

    Args:
        rule_kind: the rule.
        loss: says which loss, and has its options.
    """
    hints = get_type_hints(rule_kind)
    options = [(one.name, hints[one.name], _copy(one)) for one in fields(rule_kind)]
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


def _copy(option: Field[Any]) -> Any:  # noqa: ANN401 (what `field` returns is of any type)
    return field(default=option.default, default_factory=option.default_factory, metadata=option.metadata)
