"""HAM: Hard Adversarial Example Mining for Improving Robust Fairness (Lin et al., IEEE TIFS 20, 2025).

Warm-up with PGD-AT; then mean cross-entropy over the hard examples alone. Options below the paper's two are off by
default, and named as our reading where the authors shipped none that runs. Mining under TRADES or MART, or with class
radii or weights of other methods (which then observe the whole batch at the mining step), is ours.

*Easy examples*. Dropping them from the loss masks gradients: an example is held where the attack of training just
fails, and other attacks do not. ``easy_weight`` w keeps them, at the image of the mining step, which is paid for
already: (sum of the losses of the hard + w sum of those of the easy) / (H + w E), over all processes and accumulation
steps; 0 is the paper, 1 trains on all alike (BulletTrain keeps them so; Hua et al., NeurIPS 2021).

*Three kinds* (``stop_misclassified``; ours): what is misclassified where the attack starts, which the logits of its
first gradient tell, in the precision of the attack, is attacked to the mining step only; what is right there and wrong
at the mining step to the end; what is right at both is easy. The first kind is hard: its weight is that of the second.

*TRADES* as base: its clean cross-entropy is taken over all examples, and only its KL term over the hard and, with w,
the easy ones; both are divided by the number of examples of the update. Only hard examples then need an adversarial
row in the training forward if w is 0. MART has no term of the clean image alone: mining chooses, and w weighs, the
examples of both its terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ham_hf.methods.base import InnerAttack, OuterBatch, States
from ham_hf.methods.combining import Combinable
from ham_hf.methods.losses import trades_terms_of_some
from ham_hf.methods.mining_passes import Mining
from ham_hf.mining import HardExamples, hard_weights, mine_hard_examples, mine_three_kinds, most_confident_easy


@dataclass(frozen=True, kw_only=True)
class HAM(Mining, Combinable):
    """Train on the adversarial examples that are misclassified after ``mining_step`` attack steps."""

    name: ClassVar[str] = "ham"
    summary: ClassVar[str] = "hard adversarial example mining (Lin et al., 2025)"

    easy_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight in the loss of an easy example, at its image of mining_step; 0 = dropped (the paper), 1 = "
            "that of a hard one",
            "range": "[0, 1]",
        },
    )
    easy_fraction: float = field(
        default=1.0,
        metadata={
            "help": "fraction of a batch's easy examples to keep in the loss, the most confident first (0.3 with "
            "easy_weight 1: our reading of the authors' CIFAR-100 setting)",
            "range": "(0, 1]",
        },
    )
    stop_misclassified: bool = field(
        default=False,
        metadata={
            "help": "end the attack at mining_step also for examples that are misclassified where it starts (ours); "
            "they are trained on like other hard ones"
        },
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
        if self.easy_fraction < 1 and not self.easy_weight:
            raise ValueError(
                f"--easy_fraction {self.easy_fraction} has no effect with --easy_weight 0, which drops every easy "
                "example; set --easy_weight, or leave --easy_fraction out"
            )
        if self.stop_misclassified and not self.mining_step:
            raise ValueError(
                "--stop_misclassified with --mining_step 0: expected at least 1, as the first step tells what is "
                "misclassified at the start"
            )
        if self.hard_weighting == "probability_move" and (self.pack_hard_examples or self.stop_misclassified):
            option = "pack_hard_examples" if self.pack_hard_examples else "stop_misclassified"
            raise ValueError(
                f"--{option} does not know --hard_weighting probability_move, which watches one attack from its start "
                "to its end; take margin or none"
            )
        if self.pack_hard_examples and self.depends_on_split:
            raise ValueError(
                f"--pack_hard_examples does not know --easy_fraction {self.easy_fraction}, which goes by rank in a "
                "batch; keep all easy examples (--easy_fraction 1) or none (--easy_weight 0)"
            )

    @property
    def depends_on_split(self) -> bool:
        """See `Objective.depends_on_split`: a part of the easy examples is chosen by their rank in a batch."""
        return self.easy_weight > 0 and self.easy_fraction < 1

    @property
    def tells_wrong_at_start(self) -> bool:
        """See `Objective.tells_wrong_at_start`."""
        return self.stop_misclassified

    @property
    def trains_on_all(self) -> bool:
        """See `Mining.trains_on_all`: where all easy examples are kept, or the first term takes all clean images."""
        return self.loss.clean_term or (self.easy_weight > 0 and self.easy_fraction == 1)

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
        return self.chosen(self.mine(model, x, y, attack=attack, states=states, generator=generator), x, y)

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
        """See `Mining.mine`. Of three kinds few are attacked on, so a forward of its own is what classifies."""
        start, loss_fn = self.loss.start(x, attack.threat_model, generator), self.loss.attack_loss(model, x)
        if self.stop_misclassified:
            return mine_three_kinds(
                model,
                x,
                y,
                threat_model=attack.threat_model,
                num_steps=attack.num_steps,
                step_size=attack.step_size,
                mining_step=self.mining_step,
                start=start,
                loss_fn=loss_fn,
            )
        return mine_hard_examples(
            model,
            x,
            y,
            threat_model=attack.threat_model,
            num_steps=attack.num_steps,
            step_size=attack.step_size,
            mining_step=self.mining_step,
            start=start,
            loss_fn=loss_fn,
            track_moves=self.hard_weighting == "probability_move",
            classify_in_step=self.classify_in_step(states),
        )

    def chosen(self, mined: HardExamples, x: Tensor, y: Tensor) -> OuterBatch:
        """See `Mining.chosen`. All examples are in the order of the batch; of some, the hard ones come first."""
        rows, x_adv, weight = self._kept(mined)
        weight = weight.to(x.dtype)
        common = {"hard": mined.hard, "wrong_at_start": mined.wrong_at_start, "early_logits": mined.early.logits}
        if not self.loss.clean_term:
            clean, labels = (x, y) if rows is None else (x[rows], y[rows])
            return OuterBatch(x=self.loss.rows(x_adv, clean), y=labels, weight=weight, **common)
        each = x.new_ones(len(y))
        robust = weight if rows is None else x.new_zeros(len(y)).index_copy(0, rows, weight)
        return OuterBatch(
            x=self.loss.rows(x_adv, x),
            y=y,
            weight=torch.stack([each, robust]),
            divided_by=each,
            with_adversarial=rows,
            **common,
        )

    def _kept(self, mined: HardExamples) -> tuple[Tensor | None, Tensor, Tensor]:
        """Positions (A,) in the batch of what is trained on (None = all), adversarial images and weights."""
        weight = self.hard_weights(mined)
        if not self.easy_weight:
            return mined.rows, mined.x_adv, weight
        early = mined.early.x_adv
        if self.easy_fraction == 1:
            every = weight.new_full((len(early),), self.easy_weight)
            return None, early.index_copy(0, mined.rows, mined.x_adv), every.index_copy(0, mined.rows, weight)
        kept = most_confident_easy(mined, self.easy_fraction)
        rows, x_adv = torch.cat([mined.rows, kept]), torch.cat([mined.x_adv, early[kept]])
        return rows, x_adv, torch.cat([weight, weight.new_full((len(kept),), self.easy_weight)])

    def losses(self, logits: Tensor, batch: OuterBatch) -> Tensor:
        """See `Objective.losses`; with TRADES, where hard examples alone have an adversarial image."""
        if batch.with_adversarial is None:
            return super().losses(logits, batch)
        return trades_terms_of_some(logits, batch.y, batch.with_adversarial)

    def hard_weights(self, mined: HardExamples) -> Tensor:
        """See `Mining.hard_weights`."""
        return hard_weights(mined, self.hard_weighting)
