"""FAT: friendly adversarial training (Zhang et al., ICML 2020).

Cross-entropy on examples that are wrong, but only just: the attack on an example ends tau steps after the model
misclassifies it, and tau grows during training. As in the published code (zjfheart/Friendly-Adversarial-Training), a
step is charged to tau only where the example is wrong before it, so one that becomes right again is attacked for
longer, and Gaussian noise is added at every step. Rows keep the order of the batch here; the published code returns
them in the order in which they stop, which changes neither loss nor gradient.

Class radii of other methods (CFA's FAT variant) and class weights can be borrowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ham_hf.methods.batch import Batch, TrainingRows
from ham_hf.methods.rule_method import Borrowing
from ham_hf.methods.stopped_attack import early_stopped_pgd
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class FAT(Borrowing):
    """Train on adversarial examples of an attack that stops soon after it succeeds."""

    name: ClassVar[str] = "fat"
    summary: ClassVar[str] = "friendly adversarial training: early-stopped PGD (Zhang et al., 2020)"

    fat_tau_epochs: tuple[int, ...] = setting(
        (50, 90),
        "0-based epochs from which an example that is wrong is attacked for one step more; before the "
        "first of them the attack stops there",
        limits=">= 0, not decreasing",
        items="EPOCH",
    )
    fat_omega: float = setting(
        0.001, "standard deviation of the noise added at every step, in pixel units", at_least=0
    )

    def check(self, *, num_steps: int) -> None:
        super().check(num_steps=num_steps)
        epochs = self.fat_tau_epochs
        if any(epoch < 0 for epoch in epochs) or list(epochs) != sorted(epochs):
            raise ValueError(
                f"--fat_tau_epochs {' '.join(map(str, epochs))}: expected epochs of at least 0 that do not decrease"
            )

    def tau(self, epoch: int) -> int:
        """Number of further steps for a wrong example in this 0-based epoch."""
        return sum(epoch >= first for first in self.fat_tau_epochs)

    def inner_maximization(self, model: nn.Module, batch: Batch) -> TrainingRows:
        """See `Method.inner_maximization`. Waits for the device once per attack step, to drop rows."""
        start, loss_fn = self.start_and_loss(model, batch)
        attacked = early_stopped_pgd(
            model,
            batch.x,
            batch.y,
            attack=batch.attack,
            start=start,
            loss_fn=loss_fn,
            tau=self.tau(batch.epoch),
            noise=self.fat_omega,
            generator=batch.generator,
        )
        return batch.training_rows(attacked.stopped)
