"""HAM: Hard Adversarial Example Mining for Improving Robust Fairness (Lin et al., IEEE TIFS 20, 2025).

Warm-up with PGD-AT; then mean cross-entropy over the hard examples alone. Options below the paper's two are off by
default, and named as our reading where the authors shipped none that runs. Mining under TRADES or MART, or with class
radii or weights of other methods (which then observe the whole batch at the mining step), is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ham_hf.mining import HardExamples, hard_weights, mine_hard_examples, most_confident_easy
from ham_hf.objectives.base import InnerAttack, OuterBatch, States
from ham_hf.objectives.combining import Combinable
from ham_hf.objectives.mining_passes import Mining


@dataclass(frozen=True, kw_only=True)
class HAM(Mining, Combinable):
    """Train on the adversarial examples that are misclassified after ``mining_step`` attack steps."""

    name: ClassVar[str] = "ham"
    summary: ClassVar[str] = "hard adversarial example mining (Lin et al., 2025)"

    keep_easy_fraction: float = field(
        default=0.0,
        metadata={
            "help": "fraction of a batch's easy examples to train on too, the most confident first (our reading of "
            "the authors' CIFAR-100 setting, 0.3)",
            "range": "[0, 1]",
        },
    )
    keep_easy_as: Literal["adversarial", "clean"] = field(
        default="adversarial",
        metadata={"help": "what is kept of an easy example: its image at mining_step, or the clean image"},
    )
    hard_weighting: Literal["none", "probability_move", "margin"] = field(
        default="none",
        metadata={
            "help": "weight of a hard example (our forms): probability_move = by the largest one-step change of its "
            "class probabilities; margin = 1 to 2 by its margin at mining_step; none = 1"
        },
    )

    def check(self, *, num_steps: int) -> None:
        """See `Objective.check`."""
        super().check(num_steps=num_steps)
        if self.pack_hard_examples and (self.keep_easy_fraction or self.hard_weighting == "probability_move"):
            raise ValueError(
                "--pack_hard_examples knows neither --keep_easy_fraction nor --hard_weighting probability_move"
            )

    @property
    def depends_on_split(self) -> bool:
        """See `Objective.depends_on_split`: easy examples are kept by their rank in a batch."""
        return self.keep_easy_fraction > 0

    def outer_batch(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        attack: InnerAttack,
        epoch: int,
        states: States,
        generator: torch.Generator | None = None,
    ) -> OuterBatch:
        """See `Objective.outer_batch`."""
        if epoch < self.mining_start_epoch:
            return super().outer_batch(model, x, y, attack=attack, epoch=epoch, states=states, generator=generator)
        attack = self.attack_on(y, attack, epoch=epoch, states=states)
        mined = mine_hard_examples(
            model,
            x,
            y,
            threat_model=attack.threat_model,
            num_steps=attack.num_steps,
            step_size=attack.step_size,
            mining_step=self.mining_step,
            start=self.loss.start(x, attack.threat_model, generator),
            loss_fn=self.loss.attack_loss(model, x),
            track_moves=self.hard_weighting == "probability_move",
            classify_in_step=self.classify_in_step(states),
        )
        rows, x_adv = mined.rows, mined.x_adv
        weight = self.hard_weights(mined).to(x.dtype)
        if self.keep_easy_fraction:
            kept = most_confident_easy(mined, self.keep_easy_fraction)
            images = x if self.keep_easy_as == "clean" else mined.early.x_adv
            rows, x_adv = torch.cat([rows, kept]), torch.cat([x_adv, images[kept]])
            weight = torch.cat([weight, weight.new_ones(len(kept))])
        return OuterBatch(
            x=self.loss.rows(x_adv, x[rows]),
            y=y[rows],
            weight=weight,
            hard=mined.hard,
            early_logits=mined.early.logits,
        )

    def hard_weights(self, mined: HardExamples) -> Tensor:
        """See `Mining.hard_weights`."""
        return hard_weights(mined, self.hard_weighting)
