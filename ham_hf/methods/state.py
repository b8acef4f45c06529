"""State of a method or a class rule: named tensors, the same on every process, that only its hooks change.

The hooks come in the order of a run: `Stateful.initial_state` once, `Stateful.before_epoch` every epoch, and in every
update `Stateful.observe` on each batch, then `Stateful.after_update` with the sums over all batches and processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]
"""State of a method or class rule: named tensors, which its hooks change or replace by others of the same shape and
dtype; none is a view of another, as each is written to a checkpoint by itself."""
States: TypeAlias = Mapping[str, State]
"""The state of a method and of its rules (`ham_hf.methods.base.Method.state_keepers`), each by its name."""

Kind = TypeVar("Kind", bound="Stateful")


@dataclass(frozen=True, kw_only=True)
class Stateful:
    """Base of methods and class rules; its fields are options."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    """One line for ``--help`` and the model card; ends with the paper, "(Lin et al., 2025)", or with "(ours)"."""
    gates_averaging: ClassVar[bool] = False
    """Whether fairness-gated weight averaging belongs to the published method."""
    unrecorded: ClassVar[Mapping[str, object]] = {}
    """What options were in runs whose records lack them, where that is not today's default."""

    @property
    def warmup_epochs(self) -> int:
        """Number of first epochs in which it changes nothing: its `start_option`, or 0; 1 if it has to observe one."""
        option = self.start_option()
        return int(getattr(self, option)) if option else 0

    @classmethod
    def start_option(cls) -> str:
        """Name of the option that says when it begins, the first that ends in ``_start_epoch``; "" without one."""
        return next((one.name for one in fields(cls) if one.name.endswith("_start_epoch")), "")

    def check(self, *, num_steps: int) -> None:
        """Check the options against each other and the attack steps K of the run; ValueError names option and value.

        Each of them is valid by itself.
        """

    def initial_state(self, class_counts: Tensor) -> State:
        """State at the beginning of a run, in the dtype and on the device of ``class_counts``.

        These are the numbers of training images of each class (num_classes,); a stream may not know them (NaN), unless
        a class rule asks for them (`ham_hf.methods.class_rule.ClassRule.uses_class_counts`).
        """
        return {}

    def before_epoch(self, state: State, *, epoch: int) -> None:
        """Turn the observations of the epoch before into the state for this one.

        Once per epoch, also before epoch 0, when nothing is observed yet, and not again where a run resumes within it.
        """

    def observe(self, logits: Tensor, y: Tensor, *, epoch: int) -> Tensor | None:
        """Sums over examples with labels ``y`` (N,), of the same shape whatever their number (also 0).

        None observes nothing in this 0-based epoch, whatever the examples. ``logits`` (N, num_classes) are of
        adversarial images: of the training forward; from methods that mine, of the whole batch at the mining step, as
        the hard rows alone would say nothing of a class. They may be not finite.
        """
        return None

    def after_update(self, state: State, sums: Tensor, *, epoch: int) -> None:
        """Take in the sums of `observe` over all examples of the update, also of one that is skipped."""


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums over many examples, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def class_sums(values: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Sum of the values (N, ...) of each class (num_classes, ...), in float64 where the device has it."""
    sums = torch.zeros(num_classes, *values.shape[1:], dtype=statistics_dtype(values.device), device=values.device)
    return sums.index_add_(0, y, values.detach().to(sums.dtype))


def flagged_counts(flags: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Examples of each class that are flagged, and all (num_classes, 2); see `class_sums`."""
    flags = flags.to(statistics_dtype(flags.device))
    return class_sums(torch.stack([flags, torch.ones_like(flags)], 1), y, num_classes)


def named_kinds(base: type[Kind]) -> dict[str, type[Kind]]:
    """Every imported subclass that has a name, by it, in alphabetical order."""
    found: dict[str, type[Kind]] = {}
    pending = base.__subclasses__()
    while pending:
        kind = pending.pop(0)
        if kind.name:
            found[kind.name] = kind
        pending.extend(kind.__subclasses__())
    return dict(sorted(found.items()))
