"""Methods that are a loss and the attack that belongs to it, with every example of the batch.

PGD adversarial training (Madry et al., ICLR 2018), TRADES (Zhang et al., ICML 2019) and MART (Wang et al., ICLR 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ham_hf.methods.losses import BaseLoss, MartLoss, TradesLoss
from ham_hf.methods.rule_method import Borrowing
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class PGDAT(Borrowing):
    """Plain PGD-AT: the control of every other method, and the warm-up of many."""

    name: ClassVar[str] = "pgd_at"
    summary: ClassVar[str] = "PGD adversarial training (Madry et al., 2018)"


@dataclass(frozen=True, kw_only=True)
class TRADES(Borrowing):
    """Cross-entropy of clean images plus ``beta`` times the KL divergence to adversarial ones."""

    name: ClassVar[str] = "trades"
    summary: ClassVar[str] = "TRADES: clean cross-entropy and KL regularization (Zhang et al., 2019)"
    loss_kind: ClassVar[type[BaseLoss]] = TradesLoss

    beta: float = setting(6.0, "weight of the KL term", at_least=0)


@dataclass(frozen=True, kw_only=True)
class MART(Borrowing):
    """Boosted cross-entropy of adversarial images plus ``beta`` times a KL term for images the model is unsure of."""

    name: ClassVar[str] = "mart"
    summary: ClassVar[str] = "MART: misclassification-aware regularization (Wang et al., 2020)"
    loss_kind: ClassVar[type[BaseLoss]] = MartLoss

    beta: float = setting(5.0, "weight of the KL term", at_least=0)
