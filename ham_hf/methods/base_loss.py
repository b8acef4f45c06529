"""Options of the loss that a method is built on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ham_hf.methods.base import Method
from ham_hf.methods.losses import BASE_LOSSES, BaseLoss
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class BuiltOnLoss(Method):
    """A method that works with more than one loss."""

    base_loss: Literal["pgd_at", "trades", "mart"] = setting(
        "pgd_at", "loss that the method is built on, with the attack that belongs to it"
    )
    beta: float | None = setting(
        None, "weight of the KL term of the loss; none = its own: 6 for TRADES, 5 for MART", at_least=0
    )

    @property
    def loss(self) -> BaseLoss:
        kind = BASE_LOSSES[self.base_loss]
        return kind() if self.beta is None else kind(beta=self.beta)

    def check(self, *, num_steps: int) -> None:
        super().check(num_steps=num_steps)
        if self.beta != type(self).beta and self.num_terms == 1:
            raise ValueError(
                f"--beta {self.beta} has no effect with --base_loss {self.base_loss}, which has no KL term"
            )


@dataclass(frozen=True, kw_only=True)
class TradesOrPGDAT(BuiltOnLoss):
    """A method that works with TRADES and PGD-AT."""

    base_loss: Literal["pgd_at", "trades"] = setting(
        "trades", "loss that the method is built on, with the attack that belongs to it"
    )
