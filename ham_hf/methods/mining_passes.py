"""How the passes of mining are arranged; what is found and trained on is the same either way.

*Which pass classifies*: a forward of its own, or the gradient of the step after the mining step, which costs more but
is needed for the hard rows anyway. What is cheaper follows from the share of hard examples, measured over the epoch
before.

*Packing*: the sub-batch that mining leaves is too small to fill a fast device. With accumulation, an update has
several batches: all are mined first, the rows that are attacked further are then put together, and the rest of the
attack sees full batches. So does the training forward where only hard rows are trained on; where all are, its batches
stay as they were. The update is the same sum over the same rows; BatchNorm alone notices the fuller batches, of
which it takes its statistics.

Both are our choice; published code has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel, pgd, predicted
from ham_hf.methods.base import InnerAttack, OuterBatch, State, States
from ham_hf.methods.combining import BuiltOnLoss
from ham_hf.mining import HardExamples, rows_of

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
            "help": "attack the hard examples of all accumulation steps of an update together, in full batches, and "
            "train on them so unless all examples are trained on; needs --gradient_accumulation_steps"
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

    @property
    def trains_on_all(self) -> bool:
        """Whether every example of a batch is trained on, hard or not."""
        return False

    def hard_weights(self, mined: HardExamples) -> Tensor:
        """Weight of each hard example (H,)."""
        return torch.ones_like(mined.x_adv[:, 0, 0, 0])

    def mine(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        attack: InnerAttack,
        states: States,
        generator: torch.Generator | None,
    ) -> HardExamples:
        """Mine a batch with this attack; one of ``mining_step`` steps leaves the hard rows where they are then."""
        raise NotImplementedError(f"{self.name} does not say how it mines")

    def chosen(self, mined: HardExamples, x: Tensor, y: Tensor) -> OuterBatch:
        """What to train on of a mined batch with clean images ``x`` and labels ``y``."""
        raise NotImplementedError(f"{self.name} does not say what it trains on")

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
        return packed_outer_batches(self, model, batches, attacks, states)


def packed_outer_batches(
    method: Mining,
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor, torch.Generator]],
    attacks: Sequence[InnerAttack],
    states: States,
) -> list[OuterBatch]:
    """Mine every batch, and put the rows of all that are attacked further into as few full batches as they fill.

    Args:
        method: for the mining step, the loss, the weights and what is trained on.
        model: the unwrapped pixel model.
        batches: images (N, C, H, W), labels (N,) and source of randomness of each accumulation step.
        attacks: the attack on each of them; radius and step may be per example.
        states: class state of all parts.

    Returns:
        As many outer batches as ``batches``. Unless the method trains on all examples, the rows of all are packed as
        well, and the last ones are without a row; ``hard``, ``wrong_at_start`` and ``early_logits`` belong to the
        batch in the same place.
    """
    mining = [replace(attack, num_steps=method.mining_step) for attack in attacks]
    mined = [
        method.mine(model, x, y, attack=attack, states=states, generator=generator)
        for (x, y, generator), attack in zip(batches, mining, strict=True)
    ]
    full = max(len(labels) for _, labels, _ in batches)
    mined = _attacked_to_the_end(method, model, batches, attacks, mined, full)
    if method.trains_on_all:
        return [method.chosen(found, x, y) for found, (x, y, _) in zip(mined, batches, strict=True)]
    x = torch.cat([images[found.rows] for (images, _, _), found in zip(batches, mined, strict=True)])
    y, x_adv = torch.cat([found.y for found in mined]), torch.cat([found.x_adv for found in mined])
    weight = torch.cat([method.hard_weights(found) for found in mined]).to(x.dtype)
    chunks = [slice(number * full, (number + 1) * full) for number in range(len(mined))]
    return [
        OuterBatch(
            x=method.loss.rows(x_adv[rows], x[rows]),
            y=y[rows],
            weight=weight[rows],
            hard=found.hard,
            wrong_at_start=found.wrong_at_start,
            early_logits=found.early.logits,
        )
        for rows, found in zip(chunks, mined, strict=True)
    ]


def _attacked_to_the_end(
    method: Mining,
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor, torch.Generator]],
    attacks: Sequence[InnerAttack],
    mined: Sequence[HardExamples],
    full: int,
) -> list[HardExamples]:
    """The mined batches after the rest of the attack on their ``attacked`` rows, made in batches of ``full`` rows."""
    x = torch.cat([images[found.attacked] for (images, _, _), found in zip(batches, mined, strict=True)])
    y = torch.cat([labels[found.attacked] for (_, labels, _), found in zip(batches, mined, strict=True)])
    start = torch.cat([found.early.x_adv[found.attacked] for found in mined])
    epsilon = _of_attacked_rows([attack.threat_model.epsilon for attack in attacks], mined)
    step_size = _of_attacked_rows([attack.step_size for attack in attacks], mined)
    ends = [start[:0]]
    for first in range(0, len(y), full):
        rows = slice(first, first + full)
        ends.append(
            pgd(
                model,
                x[rows],
                y[rows],
                threat_model=ThreatModel(attacks[0].threat_model.norm, rows_of(epsilon, rows)),
                num_steps=attacks[0].num_steps - method.mining_step,
                step_size=rows_of(step_size, rows),
                start=start[rows],
                loss_fn=method.loss.attack_loss(model, x[rows]),
            )
        )
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
