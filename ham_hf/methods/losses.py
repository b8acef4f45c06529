"""The losses that methods are built on: PGD-AT, TRADES and MART, each with the attack that belongs to it.

A loss is a sum of *terms*; each term has one value per example, and is weighted and normalized on its own, so that
class-wise methods can weigh the terms differently. Losses that compare an adversarial image with its clean one take
both through one training forward: all adversarial images first, then the clean ones. (The published codes forward
them one after the other, which gives BatchNorm other statistics.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ham_hf.attacks import LossFn, ThreatModel, cross_entropy, evaluation_mode, full_precision

NORMAL_START = 0.001
"""Standard deviation, in pixel units, of the Gaussian start of the attack of TRADES and MART."""


@dataclass(frozen=True, kw_only=True)
class BaseLoss:
    """Cross-entropy of adversarial examples (PGD-AT; Madry et al., ICLR 2018): one term, attacked by itself.

    Attributes:
        beta: weight of the second term, for losses that have one.
    """

    name: ClassVar[str] = "pgd_at"
    num_terms: ClassVar[int] = 1
    paired: ClassVar[bool] = False
    """Whether a training forward takes the clean images as well."""
    clean_term: ClassVar[bool] = False
    """Whether the first term is of the clean image alone, and the second alone needs the adversarial one."""

    beta: float = 0.0

    @property
    def scales(self) -> tuple[float, ...]:
        """Weight of each term in the loss."""
        return (1.0, self.beta)[: self.num_terms]

    def start(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator | None) -> Tensor:
        """Start of the attack on the images ``x`` (N, C, H, W): uniform in the ball."""
        return threat_model.random_start(x, generator)

    def attack_loss(self, model: nn.Module, x: Tensor) -> LossFn:
        """The quantity that the attack on the images ``x`` increases: the cross-entropy."""
        return cross_entropy

    def rows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Rows of the training forward for the examples ``x`` (E, C, H, W) and their adversarial images."""
        return torch.cat([x_adv, x]) if self.paired else x_adv

    def terms(self, logits: Tensor, y: Tensor, some: Tensor | None = None) -> Tensor:
        """Value of each term for each example (T, E), unweighted.

        Args:
            logits: (R, num_classes) of `rows`.
            y: (E,) labels.
            some: (A,) positions of the examples that have an adversarial image, where not all do; only for a loss with
                a `clean_term`.
        """
        return cross_entropy(logits, y)[None]


@dataclass(frozen=True, kw_only=True)
class TradesLoss(BaseLoss):
    """Cross-entropy of clean images, and beta times KL(p(x) || p(x_adv)) (Zhang et al., ICML 2019).

    The attack increases the KL term, from ``x`` plus Gaussian noise. Without an adversarial image the term is 0.
    """

    name: ClassVar[str] = "trades"
    num_terms: ClassVar[int] = 2
    paired: ClassVar[bool] = True
    clean_term: ClassVar[bool] = True

    beta: float = 6.0

    def start(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator | None) -> Tensor:
        """See `BaseLoss.start`: Gaussian noise of 0.001, not scaled by epsilon and not clipped, as published."""
        return torch.empty_like(x).normal_(generator=generator).mul_(NORMAL_START).add_(x)

    def attack_loss(self, model: nn.Module, x: Tensor) -> LossFn:
        """See `BaseLoss.attack_loss`: the KL divergence from the prediction on ``x`` in evaluation mode."""
        with evaluation_mode(model), torch.no_grad():
            return KLFromClean(full_precision(model(x)))

    def terms(self, logits: Tensor, y: Tensor, some: Tensor | None = None) -> Tensor:
        adversarial, clean = torch.split(full_precision(logits), [len(logits) - len(y), len(y)])
        if some is None:
            divergence = kl(clean, adversarial)
        else:
            divergence = torch.zeros_like(clean[:, 0]).index_copy(0, some, kl(clean[some], adversarial))
        return torch.stack([F.cross_entropy(clean, y, reduction="none"), divergence])


@dataclass(frozen=True, kw_only=True)
class MartLoss(TradesLoss):
    """Boosted cross-entropy of adversarial images, and beta times KL by how unsure the model is of the clean image.

    Wang et al., ICLR 2020; the attack increases the cross-entropy, from ``x`` plus Gaussian noise. The small
    constants are those of the authors' code.
    """

    name: ClassVar[str] = "mart"
    clean_term: ClassVar[bool] = False

    beta: float = 5.0

    def attack_loss(self, model: nn.Module, x: Tensor) -> LossFn:
        """See `BaseLoss.attack_loss`: the cross-entropy."""
        return cross_entropy

    def terms(self, logits: Tensor, y: Tensor, some: Tensor | None = None) -> Tensor:
        adversarial, clean = full_precision(logits).chunk(2)
        p_adv, p_clean = adversarial.softmax(1), clean.softmax(1)
        runner_up = p_adv.scatter(1, y[:, None], -1.0).amax(1)
        boosted = F.cross_entropy(adversarial, y, reduction="none") - (1.0001 - runner_up + 1e-12).log()
        divergence = (p_clean * (clean.log_softmax(1) - (p_adv + 1e-12).log())).sum(1)
        unsure = 1.0000001 - p_clean.gather(1, y[:, None]).squeeze(1)
        return torch.stack([boosted, divergence * unsure])


BASE_LOSSES: dict[str, type[BaseLoss]] = {kind.name: kind for kind in (BaseLoss, TradesLoss, MartLoss)}
"""The values of ``--base_loss``."""


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) of each row (N,), from logits (N, num_classes).

    From logarithms, as the gradient with respect to a probability of exactly 0 would be NaN.
    """
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True).sum(1)


class KLFromClean:
    """KL divergence between fixed clean predictions and those of the images under attack.

    Args:
        target: (N, num_classes) logits of the clean images.
    """

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """KL divergence of each row (N,)."""
        return kl(self.target, full_precision(logits))

    def keep(self, rows: Tensor) -> None:
        self.target = self.target[rows]
