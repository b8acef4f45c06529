"""The state of a training method and its class rules during a run, and how each epoch treated the classes.

The state is the same on every process: only sums over all processes change it. It goes into checkpoints whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ham_hf.attacks import Attack
from ham_hf.methods import ClassRule, Method, TrainingRows, class_sums, flagged_counts


class MethodState:
    """State of a method and of its class rules, and a log of the current epoch.

    ``class_counts`` (num_classes,) are the numbers of training images, float64 where the device has it.

    Attributes:
        states: that of the method and of each rule, by its name.
        log: (3 + T, num_classes) sums of this process over the current epoch: hard examples, examples that were
            mined, all examples, and for each of the T terms of the loss the share of it that went to the class.
            Three more rows where the method finds examples that are wrong at the start of the attack: their number
            and, for a part of the updates, examples that are wrong without an attack, and all.
    """

    def __init__(self, method: Method, class_counts: Tensor) -> None:
        self.method, self.num_classes = method, len(class_counts)
        self.states = {one.name: one.initial_state(class_counts) for one in method.state_keepers}
        self.class_counts = class_counts
        rows = 3 + method.num_terms + (3 if method.tells_wrong_at_start else 0)
        self.log = class_counts.new_zeros(rows, self.num_classes)

    def begin_epoch(self, epoch: int, measure: Callable[[ClassRule], Tensor]) -> None:
        """Run the hooks that come before an epoch; ``measure`` gives the held-out sums of a rule."""
        self.log.zero_()
        for keeper in self.method.state_keepers:
            keeper.before_epoch(self.states[keeper.name], epoch=epoch)
        for rule in self.method.rules:
            if rule.wants_held_out(epoch):
                rule.after_held_out(self.states[rule.name], measure(rule), epoch=epoch)

    def class_probabilities(self) -> Tensor | None:
        """Probability of each class in the epoch's draws, where a rule has a sampler; None = every example once."""
        of_rules = (rule.class_probabilities(self.states[rule.name]) for rule in self.method.rules)
        return next((found for found in of_rules if found is not None), None)

    def observe(self, logits: Tensor, rows: TrainingRows, y: Tensor, *, epoch: int) -> dict[str, Tensor]:
        """Sums that they observe on one batch of labels ``y`` (N,), by name; the same shapes throughout an epoch.

        ``logits`` (R, num_classes) are those of the training forward; R may be 0.
        """
        early = rows.early_logits
        labels = rows.adversarial_y if early is None else y
        seen = (logits[: len(labels)] if early is None else early).detach()
        sums = {one.name: one.observe(seen, labels, epoch=epoch) for one in self.method.state_keepers}
        return {name: found for name, found in sums.items() if found is not None}

    def after_update(self, observed: Mapping[str, Tensor], *, epoch: int) -> None:
        """Hand the global sums of `observe` to the state keepers that they are for."""
        for keeper in self.method.state_keepers:
            if keeper.name in observed:
                keeper.after_update(self.states[keeper.name], observed[keeper.name], epoch=epoch)

    def note(self, y: Tensor, rows: TrainingRows, share: Tensor) -> None:
        """Log a batch: its labels (N,), the rows trained on, and the share (T, E) of the loss that each got."""
        if rows.hard is not None:
            self.log[:2] += flagged_counts(rows.hard, y, self.num_classes).T
        self.log[2] += class_sums(torch.ones_like(y), y, self.num_classes)
        self.log[3 : 3 + len(share)] += class_sums(share.T, rows.y, self.num_classes).T
        if rows.wrong_at_start is not None:
            self.log[-3] += class_sums(rows.wrong_at_start, y, self.num_classes)

    def note_clean(self, y: Tensor, wrong: Tensor) -> None:
        """Log which images (N,) of labels ``y`` are misclassified without an attack, if the method compares by it."""
        self.log[-2:] += flagged_counts(wrong, y, self.num_classes).T

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs, but the log, which is spread over processes."""
        return {f"{name}.{key}": value for name, state in self.states.items() for key, value in state.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `tensors` gave; ValueError if it is of a different method or number of classes."""
        found, own = ({k: [*v.shape] for k, v in state.items()} for state in (tensors, self.tensors()))
        if found != own:
            raise ValueError(
                f"the checkpoint holds class state {found}, but --method {self.method.name} keeps {own} for "
                f"{self.num_classes} classes"
            )
        for name, state in self.states.items():
            for key, value in state.items():
                state[key] = tensors[f"{name}.{key}"].to(value)

    def epoch_record(self, log: Tensor, attack: Attack, *, epoch: int) -> dict[str, Any]:
        """How the epoch treated each class, JSON types; None for quantities that it did not change.

        ``log`` is the sum of `log` over all processes, ``attack`` the one before class radii.

        Returns:
            ``hard_fraction`` and ``hard_per_class``: shares of hard examples; ``class_weight``: a class's share of the
            loss (of its first term) over its share of the examples (with a sampler, of the training images);
            ``class_kl_weight``: the same for the second term; ``class_epsilon``: radius. Where the method tells three
            kinds of example, also their shares, overall and per class, which add up to 1: ``start_wrong``
            (misclassified at the start of the attack), ``turned_wrong`` (right there and wrong at the mining step) and
            ``stayed_right``; and ``clean_wrong``, misclassified without an attack.
        """
        hard, mined, seen, *others = log.cpu().double()
        shares = others[: self.method.num_terms]
        record = _shares("hard", hard, mined)
        if self.method.tells_wrong_at_start:
            start_wrong, clean_wrong, clean_seen = others[self.method.num_terms :]
            record |= _shares("start_wrong", start_wrong, mined)
            record |= _shares("turned_wrong", hard - start_wrong, mined)
            record |= _shares("stayed_right", mined - hard, mined)
            record |= _shares("clean_wrong", clean_wrong, clean_seen)
        # A sampler changes the draws: they are compared with the training images there are.
        usual = seen if self.class_probabilities() is None else self.class_counts.cpu().double()
        for name, share in zip(("class_weight", "class_kl_weight"), shares, strict=False):
            plain = usual / usual.sum() * share.sum()
            differs = bool(((share - plain).abs() > 1e-6 * plain.abs()).any())
            record[name] = _ratios(share, plain) if differs else None
        record.setdefault("class_kl_weight", None)
        rule = self.method.radii
        of_class = None if rule is None else rule.class_attack(self.states[rule.name], attack, epoch=epoch)
        record["class_epsilon"] = None if of_class is None else of_class[0].tolist()
        return record


def _shares(name: str, part: Tensor, whole: Tensor) -> dict[str, Any]:
    """``part / whole`` over all classes and of each; None if there is no whole."""
    known = bool(whole.sum() > 0)
    return {
        f"{name}_fraction": float(part.sum() / whole.sum()) if known else None,
        f"{name}_per_class": _ratios(part, whole) if known else None,
    }


def _ratios(part: Tensor, whole: Tensor) -> list[float | None]:
    """Entry by entry ``part / whole``; None where there is no whole."""
    return [a / b if b else None for a, b in zip(part.tolist(), whole.tolist(), strict=True)]
