"""TRADES (Zhang et al., ICML 2019) and MART (Wang et al., ICLR 2020): losses of a clean and an adversarial image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ham_hf.methods.combining import Combinable
from ham_hf.methods.losses import BaseLoss, MartLoss, TradesLoss


@dataclass(frozen=True, kw_only=True)
class TRADES(Combinable):
    """Cross-entropy of clean images plus ``beta`` times the KL divergence to adversarial ones."""

    name: ClassVar[str] = "trades"
    summary: ClassVar[str] = "TRADES: clean cross-entropy and KL regularization (Zhang et al., 2019)"

    beta: float = field(default=6.0, metadata={"help": "weight of the KL term", "range": ">= 0"})

    @property
    def loss(self) -> BaseLoss:
        """See `Objective.loss`."""
        return TradesLoss(beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class MART(Combinable):
    """Boosted cross-entropy of adversarial images plus ``beta`` times a KL term for images the model is unsure of."""

    name: ClassVar[str] = "mart"
    summary: ClassVar[str] = "MART: misclassification-aware regularization (Wang et al., 2020)"

    beta: float = field(default=5.0, metadata={"help": "weight of the KL term", "range": ">= 0"})

    @property
    def loss(self) -> BaseLoss:
        """See `Objective.loss`."""
        return MartLoss(beta=self.beta)
