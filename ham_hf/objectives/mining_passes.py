"""How the passes of mining are arranged; what is found and trained on is the same either way.

*Which pass classifies*: a forward of its own, or the gradient of the step after the mining step, which costs more but
is needed for the hard rows anyway. What is cheaper follows from the share of hard examples, measured over the epoch
before.

*Packing*: the sub-batch that mining leaves is too small to fill a fast device. With accumulation, an update has
several batches: all are mined first, their hard rows are then put together, and the rest of the attack and the
training passes see full batches. The update is the same sum over the same rows; BatchNorm alone notices, as it takes
its statistics over fuller batches.

Both are our choice; published code has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel, pgd, predicted
from ham_hf.mining import HardExamples, mine_hard_examples, rows_of
from ham_hf.objectives.base import InnerAttack, OuterBatch, State, States
from ham_hf.objectives.combining import BuiltOnLoss

CLASSIFY_IN_STEP_FROM = 0.5
"""Hard fraction from which the gradient of the next step is the cheaper classification: it costs two forwards, one
more than a forward of its own, and spares those of the hard rows. Measured break-even: 0.53 (preactresnet18_cifar,
two CPU cores, float32)."""


@dataclass(frozen=True, kw_only=True)
class Mining(BuiltOnLoss):
    """A method that mines; class state: the counts that decide which pass classifies."""

    mining_step: int = field(
        default=3,
        metadata={"help": "attack steps after which what is still right is dropped", "range": ">= 0, below num_steps"},
    )
    mining_start_epoch: int = field(
        default=50,
        metadata={"help": "first 0-based epoch that mines; before it, the base loss alone", "range": ">= 0"},
    )
    pack_hard_examples: bool = field(
        default=False,
        metadata={
            "help": "attack and train on the hard examples of all accumulation steps of an update together, in "
            "full batches; needs --gradient_accumulation_steps"
        },
    )

    def check(self, *, num_steps: int) -> None:
        """See `Objective.check`."""
        super().check(num_steps=num_steps)
        if not 0 <= self.mining_step < num_steps:
            expected = f"at least 0 and below --num_steps {num_steps}"
            raise ValueError(f"--mining_step {self.mining_step}: expected {expected}")

    @property
    def warmup_epochs(self) -> int:
        """Epochs of the plain base loss before mining starts."""
        return self.mining_start_epoch

    def hard_weights(self, mined: HardExamples) -> Tensor:
        """Weight of each hard example (H,)."""
        return torch.ones_like(mined.x_adv[:, 0, 0, 0])

    def classify_in_step(self, states: States) -> bool:
        """Whether the step after the mining step is to classify, in this epoch."""
        # Kept on the CPU: reading it in every batch waits for nothing.
        return bool(states[self.name]["classify_in_step"])

    def initial_state(self, class_counts: Tensor) -> State:
        """See `Objective.initial_state`."""
        return {"mined": class_counts.new_zeros(2), "classify_in_step": torch.zeros((), dtype=torch.bool)}

    def before_epoch(self, state: State, *, epoch: int) -> None:
        """See `Objective.before_epoch`."""
        hard, mined = state["mined"].tolist()
        state["classify_in_step"].fill_(hard > CLASSIFY_IN_STEP_FROM * mined)
        state["mined"].zero_()

    def observe(self, logits: Tensor, y: Tensor, *, epoch: int) -> Tensor | None:
        """See `Objective.observe`: number of hard examples and of all, once mining has begun."""
        if epoch < self.warmup_epochs:
            return None
        hard = predicted(logits) != y if len(y) else torch.zeros_like(y, dtype=torch.bool)
        return torch.stack([hard, torch.ones_like(hard)]).sum(1)

    def after_update(self, state: State, sums: Tensor) -> None:
        """See `Objective.after_update`."""
        state["mined"] += sums

    def outer_batches(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Tensor, Tensor, torch.Generator]],
        *,
        attack: InnerAttack,
        epoch: int,
        states: States,
    ) -> list[OuterBatch]:
        """See `Objective.outer_batches`."""
        if not self.pack_hard_examples or epoch < self.warmup_epochs:
            return super().outer_batches(model, batches, attack=attack, epoch=epoch, states=states)
        attacks = [self.attack_on(y, attack, epoch=epoch, states=states) for _, y, _ in batches]
        return packed_outer_batches(self, model, batches, attacks)


def packed_outer_batches(
    method: Mining,
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor, torch.Generator]],
    attacks: Sequence[InnerAttack],
) -> list[OuterBatch]:
    """Mine every batch, and put the hard rows of all into as few full batches as they fill.

    Args:
        method: for the mining step, the loss and the weights.
        model: the unwrapped pixel model.
        batches: images (N, C, H, W), labels (N,) and source of randomness of each accumulation step.
        attacks: the attack on each of them; radius and step may be per example.

    Returns:
        As many outer batches as ``batches``, the last ones without a row; ``hard`` and ``early_logits`` belong to
        the batch in the same place.
    """
    loss, mining_step = method.loss, method.mining_step
    mined = [
        mine_hard_examples(
            model,
            x,
            y,
            threat_model=attack.threat_model,
            num_steps=mining_step,
            step_size=attack.step_size,
            mining_step=mining_step,
            start=loss.start(x, attack.threat_model, generator),
            loss_fn=loss.attack_loss(model, x),
        )
        for (x, y, generator), attack in zip(batches, attacks, strict=True)
    ]
    x = torch.cat([images[found.rows] for (images, _, _), found in zip(batches, mined, strict=True)])
    y, early = torch.cat([found.y for found in mined]), torch.cat([found.x_adv for found in mined])
    weight = torch.cat([method.hard_weights(found) for found in mined])
    epsilon = _of_hard_rows([attack.threat_model.epsilon for attack in attacks], mined)
    step_size = _of_hard_rows([attack.step_size for attack in attacks], mined)
    full = max(len(labels) for _, labels, _ in batches)
    outer = []
    for number, found in enumerate(mined):
        rows = slice(number * full, (number + 1) * full)
        x_adv, clean, labels = early[rows], x[rows], y[rows]
        if len(labels):
            x_adv = pgd(
                model,
                clean,
                labels,
                threat_model=ThreatModel(attacks[number].threat_model.norm, rows_of(epsilon, rows)),
                num_steps=attacks[number].num_steps - mining_step,
                step_size=rows_of(step_size, rows),
                start=x_adv,
                loss_fn=loss.attack_loss(model, clean),
            )
        outer.append(
            OuterBatch(
                x=loss.rows(x_adv, clean),
                y=labels,
                weight=weight[rows],
                hard=found.hard,
                early_logits=found.early.logits,
            )
        )
    return outer


def _of_hard_rows(values: Sequence[float | Tensor], mined: Sequence[HardExamples]) -> float | Tensor:
    """A value per example of several batches, for the hard rows of all; a number as it is."""
    parts = [rows_of(value, found.rows) for value, found in zip(values, mined, strict=True)]
    per_example = [part for part in parts if isinstance(part, Tensor) and part.ndim]
    return torch.cat(per_example) if per_example else parts[0]
