"""HAM: Hard Adversarial Example Mining for Improving Robust Fairness (Lin et al., IEEE TIFS 20, 2025).

Warm up with PGD-AT, then take the mean cross-entropy over the hard examples alone. Options beyond the paper's two are
off by default; those that are our reading, because the authors shipped none that runs, say so. Mining under TRADES or
MART, or with class radii or weights of other methods (which then observe the whole batch at the mining step), is ours.

*Easy examples*. Dropping them from the loss masks gradients: the training attack fails on an example where other
attacks succeed. ``easy_weight`` w keeps them, at the image of the mining step, which is already computed:
(sum of the losses of the hard + w sum of those of the easy) / (H + w E), over all processes and accumulation steps.
0 is the paper; 1 trains on all alike, as BulletTrain does (Hua et al., NeurIPS 2021).

*Three kinds* (``stop_misclassified``; ours). Examples misclassified at the start of the attack, by the logits of its
first gradient in the precision of the attack, are attacked to the mining step only. Those right there and wrong at the
mining step are attacked to the end. Those right at both are easy. The first kind is hard and weighs like the second.

*TRADES* as base: the clean cross-entropy covers all examples, the KL term only the hard and, with w, the easy ones;
both are divided by the number of examples of the update. If w is 0, only hard examples need an adversarial row in the
training forward. MART has no term of the clean image alone: mining chooses, and w weighs, the examples of both terms.

*Which pass classifies* (our choice): a separate forward, or the gradient of the step after the mining step, which
costs more but is needed for the hard rows anyway. The share of hard examples in the epoch before decides.

*Packing* (``pack_hard_examples``; our choice): the sub-batch that mining leaves is too small to fill a fast device.
With accumulation, all batches of an update are mined first, and the rows attacked further are then put together, so
the rest of the attack sees full batches. The training forward does too if only hard rows are trained on; otherwise its
batches stay as they were. The update is the same sum over the same rows; only BatchNorm's statistics see the fuller
batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ham_hf.attacks import Attack, ThreatModel, predicted, rows_of
from ham_hf.methods.base import BuiltOnLoss
from ham_hf.methods.batch import Batch, TrainingRows
from ham_hf.methods.rule_method import Borrowing
from ham_hf.methods.state import State
from ham_hf.mining import HardExamples, hard_weights, mine_hard_examples, mine_three_kinds, most_confident_easy
from ham_hf.settings import setting

CLASSIFY_IN_STEP_FROM = 0.5
"""Hard fraction from which the gradient of the next step is the cheaper classification: it costs two forwards, one
more than a forward of its own, and spares those of the hard rows. Measured break-even: 0.53 (preactresnet18_cifar,
two CPU cores, float32)."""


@dataclass(frozen=True, kw_only=True)
class HAM(BuiltOnLoss, Borrowing):
    """Train on the adversarial examples that are misclassified after ``mining_step`` attack steps.

    State: the counts that decide which pass classifies.
    """

    name: ClassVar[str] = "ham"
    summary: ClassVar[str] = "hard adversarial example mining (Lin et al., 2025)"

    mining_step: int = setting(
        3, "attack steps after which examples still right are dropped", limits=">= 0, below num_steps"
    )
    mining_start_epoch: int = setting(50, "first 0-based epoch that mines; before it, the base loss alone", at_least=0)
    pack_hard_examples: bool = setting(
        False,
        "attack the hard examples of all accumulation steps of an update together, in full batches, and "
        "train on them so unless all examples are trained on; needs --gradient_accumulation_steps",
    )

    easy_weight: float = setting(
        0.0,
        "weight in the loss of an easy example, at its image of mining_step; 0 = dropped (the paper), 1 = "
        "that of a hard one",
        at_least=0,
        at_most=1,
    )
    easy_fraction: float = setting(
        1.0,
        "fraction of a batch's easy examples to keep in the loss, the most confident first (0.3 with "
        "easy_weight 1: our reading of the authors' CIFAR-100 setting)",
        above=0,
        at_most=1,
    )
    stop_misclassified: bool = setting(
        False,
        "end the attack at mining_step also for examples that are misclassified where it starts (ours); "
        "they are trained on like other hard ones",
    )
    hard_weighting: Literal["none", "probability_move", "margin"] = setting(
        "none",
        "weight of a hard example (our forms): probability_move = by the largest one-step change of its "
        "class probabilities; margin = 1 to 2 by its margin at mining_step; none = 1",
    )

    def check(self, *, num_steps: int) -> None:
        super().check(num_steps=num_steps)
        if not 0 <= self.mining_step < num_steps:
            expected = f"at least 0 and below --num_steps {num_steps}"
            raise ValueError(f"--mining_step {self.mining_step}: expected {expected}")
        if self.easy_fraction < 1 and not self.easy_weight:
            raise ValueError(
                f"--easy_fraction {self.easy_fraction} has no effect with --easy_weight 0, which drops every easy "
                "example; set --easy_weight, or leave --easy_fraction out"
            )
        if self.stop_misclassified and not self.mining_step:
            raise ValueError(
                "--stop_misclassified with --mining_step 0: expected at least 1, as the first step finds the examples "
                "misclassified at the start"
            )
        if self.hard_weighting == "probability_move" and (self.pack_hard_examples or self.stop_misclassified):
            option = "pack_hard_examples" if self.pack_hard_examples else "stop_misclassified"
            raise ValueError(
                f"--{option} does not work with --hard_weighting probability_move, which follows one attack from its "
                "start to its end; take margin or none"
            )
        if self.pack_hard_examples and self.depends_on_split:
            raise ValueError(
                f"--pack_hard_examples does not work with --easy_fraction {self.easy_fraction}, which goes by rank in "
                "a batch; keep all easy examples (--easy_fraction 1) or none (--easy_weight 0)"
            )

    @property
    def depends_on_split(self) -> bool:
        """True if part of the easy examples is chosen, which goes by their rank in a batch."""
        return self.easy_weight > 0 and self.easy_fraction < 1

    @property
    def tells_wrong_at_start(self) -> bool:
        return self.stop_misclassified

    def inner_maximization(self, model: nn.Module, batch: Batch) -> TrainingRows:
        if batch.epoch < self.mining_start_epoch:
            return super().inner_maximization(model, batch)
        return self.chosen(self.mine(model, batch), batch)

    def mine(self, model: nn.Module, batch: Batch) -> HardExamples:
        """Mine a batch; an attack of ``mining_step`` steps leaves the hard rows where they are then.

        With three kinds few rows are attacked further, so a separate forward classifies.
        """
        start, loss_fn = self.start_and_loss(model, batch)
        x, y, attack, mining_step = batch.x, batch.y, batch.attack, self.mining_step
        if self.stop_misclassified:
            return mine_three_kinds(model, x, y, attack=attack, mining_step=mining_step, start=start, loss_fn=loss_fn)
        return mine_hard_examples(
            model,
            x,
            y,
            threat_model=attack.threat_model,
            num_steps=attack.num_steps,
            step_size=attack.step_size,
            mining_step=mining_step,
            start=start,
            loss_fn=loss_fn,
            track_moves=self.hard_weighting == "probability_move",
            # Kept on the CPU: reading it in every batch waits for nothing.
            classify_in_step=bool(batch.states[self.name]["classify_in_step"]),
        )

    def chosen(self, mined: HardExamples, batch: Batch) -> TrainingRows:
        """Choose the rows to train on from a mined batch.

        If all examples are kept, they stay in the order of the batch; otherwise the hard ones come first.
        """
        x, y = batch.x, batch.y
        rows, x_adv, weight = self._kept(mined)
        weight = weight.to(x.dtype)
        if not self.loss.clean_term:
            clean, labels = (x, y) if rows is None else (x[rows], y[rows])
            return TrainingRows(x=self.loss.rows(x_adv, clean), y=labels, weight=weight, **_found(mined))
        each = x.new_ones(len(y))
        robust = weight if rows is None else x.new_zeros(len(y)).index_copy(0, rows, weight)
        return TrainingRows(
            x=self.loss.rows(x_adv, x),
            y=y,
            weight=torch.stack([each, robust]),
            divided_by=each,
            with_adversarial=rows,
            **_found(mined),
        )

    def _kept(self, mined: HardExamples) -> tuple[Tensor | None, Tensor, Tensor]:
        """Positions (A,) in the batch of the examples to train on (None = all), adversarial images and weights."""
        weight = hard_weights(mined, self.hard_weighting)
        if not self.easy_weight:
            return mined.rows, mined.x_adv, weight
        early = mined.early.x_adv if self.mining_step else mined.early.x_adv.clamp(0, 1)  # TRADES starts unclipped
        if self.easy_fraction == 1:
            every = weight.new_full((len(early),), self.easy_weight)
            return None, early.index_copy(0, mined.rows, mined.x_adv), every.index_copy(0, mined.rows, weight)
        kept = most_confident_easy(mined, self.easy_fraction)
        rows, x_adv = torch.cat([mined.rows, kept]), torch.cat([mined.x_adv, early[kept]])
        return rows, x_adv, torch.cat([weight, weight.new_full((len(kept),), self.easy_weight)])

    def initial_state(self, class_counts: Tensor) -> State:
        return {"mined": class_counts.new_zeros(2), "classify_in_step": torch.zeros((), dtype=torch.bool)}

    def before_epoch(self, state: State, *, epoch: int) -> None:
        hard, mined = state["mined"].tolist()
        state["classify_in_step"].fill_(hard > CLASSIFY_IN_STEP_FROM * mined)
        state["mined"].zero_()

    def observe(self, logits: Tensor, y: Tensor, *, epoch: int) -> Tensor | None:
        """Count the hard examples and all examples."""
        if epoch < self.warmup_epochs:
            return None
        hard = predicted(logits) != y
        return torch.stack([hard, torch.ones_like(hard)]).sum(1)

    def after_update(self, state: State, sums: Tensor, *, epoch: int) -> None:
        state["mined"] += sums

    def rows_of_update(self, model: nn.Module, batches: Sequence[Batch]) -> list[TrainingRows]:
        if not self.pack_hard_examples or batches[0].epoch < self.warmup_epochs:
            return super().rows_of_update(model, batches)
        return packed_rows(self, model, [self.with_class_radii(batch) for batch in batches])


def packed_rows(method: HAM, model: nn.Module, batches: Sequence[Batch]) -> list[TrainingRows]:
    """Mine every batch, and put the rows of all that are attacked further into as few full batches as they fill.

    Returns:
        As many entries as ``batches``. Unless the method trains on all examples, the rows of all are packed as well,
        and the last entries have none; ``hard``, ``wrong_at_start`` and ``early_logits`` are of the batch in the same
        place.
    """
    mined = []
    for batch in batches:
        to_mining_step = replace(batch.attack, num_steps=method.mining_step)
        mined.append(method.mine(model, replace(batch, attack=to_mining_step)))
    full = max(len(batch.y) for batch in batches)
    mined = _attacked_to_the_end(method, model, batches, mined, full)
    if method.loss.clean_term or method.easy_weight:
        # Every example is trained on: the first term takes all clean images, or all easy examples are kept.
        return [method.chosen(found, batch) for found, batch in zip(mined, batches, strict=True)]
    x = torch.cat([batch.x[found.rows] for batch, found in zip(batches, mined, strict=True)])
    y, x_adv = torch.cat([found.y for found in mined]), torch.cat([found.x_adv for found in mined])
    weight = torch.cat([hard_weights(found, method.hard_weighting) for found in mined]).to(x.dtype)
    chunks = [slice(number * full, (number + 1) * full) for number in range(len(mined))]
    return [
        TrainingRows(x=method.loss.rows(x_adv[rows], x[rows]), y=y[rows], weight=weight[rows], **_found(found))
        for rows, found in zip(chunks, mined, strict=True)
    ]


def _found(mined: HardExamples) -> dict[str, Tensor | None]:
    """The results of mining for the whole batch."""
    return {"hard": mined.hard, "wrong_at_start": mined.wrong_at_start, "early_logits": mined.early.logits}


def _attacked_to_the_end(
    method: HAM, model: nn.Module, batches: Sequence[Batch], mined: Sequence[HardExamples], full: int
) -> list[HardExamples]:
    """The mined batches after the rest of the attack on their ``attacked`` rows, made in batches of ``full`` rows."""
    x = torch.cat([batch.x[found.attacked] for batch, found in zip(batches, mined, strict=True)])
    y = torch.cat([batch.y[found.attacked] for batch, found in zip(batches, mined, strict=True)])
    start = torch.cat([found.early.x_adv[found.attacked] for found in mined])
    attacks = [batch.attack for batch in batches]
    rest = Attack(
        threat_model=ThreatModel(
            attacks[0].threat_model.norm, _of_attacked_rows([attack.threat_model.epsilon for attack in attacks], mined)
        ),
        num_steps=attacks[0].num_steps - method.mining_step,
        step_size=_of_attacked_rows([attack.step_size for attack in attacks], mined),
    )
    ends = [start[:0]]
    for first in range(0, len(y), full):
        rows = slice(first, first + full)
        loss_fn = method.loss.attack_loss(model, x[rows])
        ends.append(rest.rows(rows)(model, x[rows], y[rows], start=start[rows], loss_fn=loss_fn))
    of_batch = torch.split(torch.cat(ends), [len(found.attacked) for found in mined])
    return [
        replace(found, x_adv=found.early.x_adv.index_copy(0, found.attacked, end)[found.rows])
        for found, end in zip(mined, of_batch, strict=True)
    ]


def _of_attacked_rows(values: Sequence[float | Tensor], mined: Sequence[HardExamples]) -> float | Tensor:
    """A value per example of several batches, for the rows of all that are attacked on; a number as it is."""
    parts = [rows_of(value, found.attacked) for value, found in zip(values, mined, strict=True)]
    per_example = [part for part in parts if isinstance(part, Tensor) and part.ndim]
    return torch.cat(per_example) if per_example else parts[0]
