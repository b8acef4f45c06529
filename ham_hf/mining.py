"""Hard adversarial example mining (HAM; Lin et al., IEEE TIFS 2025): attack, drop the easy, attack the hard further.

An example is *hard* if the model misclassifies it after ``mining_step`` attack steps or its logits are not finite, and
*easy* otherwise. PGD has no memory between steps, so HAM is ``pgd(M)``, a mask, and ``pgd(K - M)`` on the hard rows.

`mine_three_kinds` (ours) also ends the attack early for examples that are misclassified before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ham_hf.attacks import (
    Attack,
    LossFn,
    ThreatModel,
    attack_mode,
    check_batch,
    cross_entropy,
    margin_loss,
    ordinary,
    outside_inference_mode,
    predicted,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class EarlyAttack:
    """The whole batch after the first ``mining_step`` attack steps.

    Attributes:
        x_adv: (N, C, H, W) images at that iterate.
        logits: (N, num_classes) of those images, evaluation mode.
    """

    x_adv: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class HardExamples:
    """The rows worth training on, in the order of the batch.

    Attributes:
        x_adv: (H, C, H, W) adversarial images of the hard rows where their attack ended: after all steps, or, for the
            first of three kinds, at the mining step.
        y: (H,) their labels.
        hard: (N,) bool over the whole batch, True = hard (misclassified at the mining step; of three kinds, there or
            at the start). A row that the model gets right again later stays hard.
        rows: (H,) positions of the hard rows in the batch.
        attacked: (D,) positions in the batch of the hard rows that are attacked to the end: all, or the second of
            three kinds.
        early: the whole batch at the mining step.
        wrong_at_start: (N,) bool, misclassified where the attack started; None unless there are three kinds.
        largest_move: (H,) if asked for: the largest L1 distance, in [0, 2], between the class probabilities of
            two consecutive iterates among those whose logits the attack computes anyway (0 .. num_steps - 1).
    """

    x_adv: Tensor
    y: Tensor
    hard: Tensor
    rows: Tensor
    attacked: Tensor
    early: EarlyAttack
    wrong_at_start: Tensor | None = None
    largest_move: Tensor | None = None


def mine_hard_examples(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    num_steps: int,
    step_size: float | Tensor,
    mining_step: int,
    start: Tensor | None = None,
    loss_fn: LossFn = cross_entropy,
    generator: torch.Generator | None = None,
    track_moves: bool = False,
    classify_in_step: bool = False,
) -> HardExamples:
    """Attack for ``mining_step`` steps, drop the rows still classified correctly, attack the rest to the end.

    Passes, with H of N rows hard: ``mining_step`` gradients on N rows, one forward on N rows to classify, and
    ``num_steps - mining_step`` gradients on H rows (none if H = 0). With ``classify_in_step``, one gradient on N rows
    replaces the forward on N rows and one gradient on H rows. A gradient costs about two forwards, so this is cheaper
    if more than half of the rows are hard. It finds the same rows.

    Args:
        model: maps pixels (N, C, H, W) in [0, 1] to logits (N, num_classes); not a DDP wrapper.
        x: clean images (N, C, H, W) in [0, 1].
        y: labels (N,).
        threat_model: the ball; epsilon may be (N,).
        num_steps: K, all attack steps.
        step_size: length of a step in pixel units, a number or (N,).
        mining_step: M, the iterate that decides; 0 <= M <= K.
        start: images to start from; None draws them uniformly from the ball.
        loss_fn: loss that the attack increases, per example; a `RowLoss` is told which rows are left.
        generator: source of the random start, on the device of ``x``.
        track_moves: also return ``largest_move``; costs no pass over the model.
        classify_in_step: let the step after the mining step classify, if there is one.

    Raises:
        ValueError: if the batch is malformed or not 0 <= mining_step <= num_steps.
    """
    check_batch(x, y)
    if not 0 <= mining_step <= num_steps:
        raise ValueError(f"mining_step must lie in 0..num_steps={num_steps}, got {mining_step}")
    moves = LargestMove(loss_fn) if track_moves else None
    loss_fn = moves or loss_fn
    early = Attack(threat_model=threat_model, num_steps=mining_step, step_size=step_size)
    left = num_steps - mining_step
    # One change of mode for the whole attack; the nested ones inside pgd then find nothing to do.
    with outside_inference_mode(), attack_mode(model):
        x, y = ordinary(x), ordinary(y)
        x_next = x_early = early(model, x, y, start=start, loss_fn=loss_fn, generator=generator)
        if left and classify_in_step:
            seen, left = FirstLogits(loss_fn), left - 1
            x_next = replace(early, num_steps=1)(model, x, y, start=x_early, loss_fn=seen)
            logits = seen.logits
        else:
            with torch.no_grad():
                logits = model(x_early)
        hard = predicted(logits) != y
        # Indexing with positions finds them once; every boolean index would search, and wait, again.
        rows = hard.nonzero().squeeze(1)
        x_adv = _attacked_on(replace(early, num_steps=left), model, x, y, rows, x_next, loss_fn)
        return HardExamples(
            x_adv=x_adv,
            y=y[rows],
            hard=hard,
            rows=rows,
            attacked=rows,
            early=EarlyAttack(x_adv=x_early, logits=logits),
            largest_move=moves.found(x_adv) if moves is not None else None,
        )


def mine_three_kinds(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    attack: Attack,
    mining_step: int,
    start: Tensor | None = None,
    loss_fn: LossFn = cross_entropy,
    generator: torch.Generator | None = None,
) -> HardExamples:
    """Mine, and attack to the end only rows that are right at the start and wrong at the mining step.

    Rows misclassified at the start are hard too, but their attack ends at the mining step. Rows right both times are
    easy. The logits of the first gradient tell which rows are wrong at the start, at no cost. Our choice, after
    BulletTrain (Hua et al., NeurIPS 2021), which tells its three kinds by the clean image. Arguments are those of
    `mine_hard_examples`; ``attack`` holds all K steps. Raises ValueError unless 1 <= mining_step <= K.
    """
    if not 1 <= mining_step <= attack.num_steps:
        raise ValueError(f"mining_step must lie in 1..num_steps={attack.num_steps} for three kinds, got {mining_step}")
    seen = FirstLogits(loss_fn)
    with outside_inference_mode(), attack_mode(model):
        x, y = ordinary(x), ordinary(y)
        mined = mine_hard_examples(
            model,
            x,
            y,
            threat_model=attack.threat_model,
            num_steps=mining_step,
            step_size=attack.step_size,
            mining_step=mining_step,
            start=start,
            loss_fn=seen,
            generator=generator,
        )
        wrong_at_start = predicted(seen.logits) != y
        attacked = (mined.hard & ~wrong_at_start).nonzero().squeeze(1)
        rest = replace(attack, num_steps=attack.num_steps - mining_step)
        ends = _attacked_on(rest, model, x, y, attacked, mined.early.x_adv, loss_fn)
        x_adv = mined.early.x_adv.index_copy(0, attacked, ends)
    hard = mined.hard | wrong_at_start
    rows = hard.nonzero().squeeze(1)
    return replace(
        mined, x_adv=x_adv[rows], y=y[rows], hard=hard, rows=rows, attacked=attacked, wrong_at_start=wrong_at_start
    )


def _attacked_on(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor, start: Tensor, loss_fn: LossFn
) -> Tensor:
    """Where the attack leads from ``start`` (N, C, H, W), for the rows of the batch at these positions."""
    if isinstance(loss_fn, RowLoss):
        loss_fn.keep(rows)
    if not len(rows):
        return start[rows]
    return attack.rows(rows)(model, x[rows], y[rows], start=start[rows], loss_fn=loss_fn)


def hard_weights(mined: HardExamples, kind: str) -> Tensor:
    """Weight of each hard example (H,): "none" (1), "margin" or, of tracked moves, "probability_move" (our forms)."""
    if kind == "none":
        return torch.ones_like(mined.x_adv[:, 0, 0, 0])
    if kind == "margin":
        return 1 + margin_loss(mined.early.logits[mined.rows].softmax(1), mined.y).nan_to_num(1).clamp(min=0)
    assert mined.largest_move is not None  # noqa: S101 (tracked where it weighs)
    # The shape left in the authors' script, 1 - (tanh(-1 + 5 (m/2 - w) / (m/2)) + 1) / 2, with m = 2, the largest
    # distance two distributions can have, where the script took the batch maximum: a weight then does not depend on
    # the other rows, nor on how they are spread over processes.
    return 1 - (torch.tanh(4 - 5 * mined.largest_move) + 1) / 2


def most_confident_easy(mined: HardExamples, fraction: float) -> Tensor:
    """Positions in the batch of this fraction of the easy examples (rounded), the most confident first."""
    easy = (~mined.hard).nonzero().squeeze(1)
    confidence = mined.early.logits[easy].softmax(1).amax(1)
    return easy[confidence.argsort(descending=True, stable=True)[: round(fraction * len(easy))]]


@runtime_checkable
class RowLoss(Protocol):
    """A loss of an attack that remembers something of each row of the batch."""

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss of each row (N,)."""

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but those at the given positions."""


class FirstLogits:
    """A loss for :func:`ham_hf.attacks.pgd` that keeps the logits of its first call, at the attack's start."""

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn
        self.logits = torch.empty(0)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        if not self.logits.numel():
            self.logits = logits.detach()
        return self.loss_fn(logits, y)


class LargestMove:
    """A loss for :func:`ham_hf.attacks.pgd` that also tracks how far the probabilities move per step."""

    def __init__(self, loss_fn: LossFn = cross_entropy) -> None:
        self.loss_fn = loss_fn
        self.previous: Tensor | None = None
        self.largest: Tensor | None = None

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        probabilities = logits.detach().softmax(1)
        if self.previous is None or self.largest is None:
            self.largest = torch.zeros_like(probabilities[:, 0])
        else:
            self.largest = torch.maximum(self.largest, (probabilities - self.previous).abs().sum(1))
        self.previous = probabilities
        return self.loss_fn(logits, y)

    def found(self, x_adv: Tensor) -> Tensor:
        """The largest move of each row of ``x_adv`` that is left; 0 where fewer than two iterates were seen."""
        return torch.zeros_like(x_adv[:, 0, 0, 0]) if self.largest is None else self.largest

    def keep(self, rows: Tensor) -> None:
        if isinstance(self.loss_fn, RowLoss):
            self.loss_fn.keep(rows)
        if self.previous is not None and self.largest is not None:
            self.previous, self.largest = self.previous[rows], self.largest[rows]
