"""Attacks over a split, one flag per example, distributed over processes, resumable after a kill.

The split is cut into fixed batches, shared out over the processes, and the noise of a batch is drawn from the batch's
number: the flags depend neither on the number of processes, nor on where an evaluation was interrupted, nor on how
many images the device takes at once. The model is attacked through its unwrapped module, in evaluation mode, in the
precision and memory layout it is given in.

PGD and CW count the **last** iterate, as published evaluations do. So an example that is misclassified on the way
stays under attack: it may be right again at the end, and dropping it would give a lower number ("wrong at any
iterate") that no published one compares with. An image that is already misclassified is lost, and is not attacked.

Logits that are not finite are never right: a model with such logits on clean images is rejected; under attack they
count as broken, with the prediction `ham_hf.attacks.NOT_FINITE`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from ham_hf.attacks import (
    NOT_FINITE,
    Attack,
    LossFn,
    check_pixel_range,
    evaluation_mode,
    full_precision,
    margin_loss,
    predicted,
    unsaturated_cross_entropy,
)
from ham_hf.data import Images, PixelBatch
from ham_hf.evaluation.batch_sharing import Outcome, PiecewiseModel, SharedBatches, StopWatch, WorkingSize, Workplace
from ham_hf.evaluation.foreign import ForeignAttack
from ham_hf.seeding import Stream, make_generator

logger = logging.getLogger(__name__)

LOSSES: dict[str, LossFn] = {"cross-entropy": unsaturated_cross_entropy, "margin": margin_loss}


class NonFiniteLogitsError(RuntimeError):
    """The logits of a model are not finite on ``count`` of ``total`` clean images: nothing to attack, no result.

    ``cause`` is what its weights tell of it.
    """

    def __init__(self, count: int, total: int, cause: str) -> None:
        self.count, self.total, self.cause = count, total, cause
        super().__init__(
            f"the logits of the model are not finite on {count} of {total} clean images, "
            f"so there is no result: {cause}. Take other weights, of an earlier epoch for example, or train with a "
            "lower --learning_rate"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class NamedAttack(Attack):
    """The attack of an evaluation.

    Attributes:
        name: key of the result, such as "pgd-20".
        loss: "cross-entropy" (PGD; `ham_hf.attacks.unsaturated_cross_entropy`) or "margin" (CW, on the logits).
    """

    name: str
    loss: str = "cross-entropy"

    def settings(self, seed: int) -> dict[str, object]:
        """The attack's settings as a report shows them; JSON types only."""
        return {**self.as_json(), "loss": self.loss, "random_start": True, "restarts": 1, "seed": seed}


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackResult:
    """Outcome of one attack (or of none: "clean") on every example of a split.

    Attributes:
        name: "clean", "pgd-20", "cw-20", "autoattack", ...
        settings: of the attack: norm, epsilon, num_steps, step_size, loss, seed, ...
        predictions: (N,) int64, CPU: predicted class of the attacked image, -1 where its logits are not finite.
        margins: (N,) float32, CPU: margin of the attacked image, logit of the true class minus the largest other one;
            positive = right. Of PGD and CW at the last iterate, of AutoAttack see `evaluate_autoattack`; an image that
            is not attacked, as it is already misclassified, has its clean margin.
        labels: (N,) int64, CPU.
        indices: (N,) int64, CPU: positions of the examples in the split.
        seconds: wall-clock time of this attack, the mean over processes; earlier parts of an evaluation that was
            interrupted included.
    """

    name: str
    settings: dict[str, object]
    predictions: Tensor
    margins: Tensor
    labels: Tensor
    indices: Tensor
    seconds: float

    @property
    def flags(self) -> Tensor:
        """(N,) bool, CPU: right when clean and under the attack; an image that is wrong when clean is not attacked."""
        return self.predictions == self.labels


def standard_attacks(attack: Attack) -> tuple[NamedAttack, NamedAttack]:
    """The two attacks every report holds: PGD and CW in the same ball, with the same number and size of steps."""
    names = {f"pgd-{attack.num_steps}": "cross-entropy", f"cw-{attack.num_steps}": "margin"}
    pgd, cw = (NamedAttack(name=name, loss=loss, **vars(attack)) for name, loss in names.items())
    return pgd, cw


def evaluate(
    model: nn.Module, images: Images, attacks: Sequence[NamedAttack | ForeignAttack], place: Workplace
) -> dict[str, AttackResult]:
    """Clean accuracy and the accuracy under each attack, for every example of a split.

    An image that is already misclassified counts as lost to every attack and is not attacked. A batch that does not
    fit into the memory of the device is attacked in parts; noise is drawn for the whole batch, so that the result is
    the same.

    Args:
        model: the unwrapped pixel model.
        images: the split.
        attacks: what to run beside "clean".
        place: where it runs.

    Returns:
        Results by name, "clean" first; the same on every process.

    Raises:
        ValueError: if the split is empty or holds pixels outside [0, 1].
        NonFiniteLogitsError: if the logits of a clean image are not finite.
        RuntimeError: the allocator's, if not even one image fits into memory.
    """
    if not len(images):
        raise ValueError("there is no example to evaluate on")
    settings = [["clean", {}], *([attack.name, attack.settings(place.seed)] for attack in attacks)]
    attacker = _BatchAttacker(model, attacks, WorkingSize(place.batch_size), place.seed)
    every = torch.arange(len(images))
    shared = SharedBatches(
        "evaluating",
        torch.split(every, place.batch_size),
        shape=(1 + len(attacks), len(images)),
        place=place,
        key=place.key(model, images),
        settings={"results": settings},
    )
    with evaluation_mode(model):
        for number, batch in shared.of(images):
            shared.add(number, attacker(number, batch))
    warns = place.accelerator.is_main_process
    return _results(model, attacks, shared.gather(), images.labels, every, seed=place.seed, warns=warns)


def evaluate_batches(
    model: nn.Module, batches: Iterable[PixelBatch], attacks: Sequence[NamedAttack | ForeignAttack], *, seed: int
) -> dict[str, AttackResult]:
    """`evaluate` on batches, one at least, that come one by one and are seen once, in this process alone.

    ``batches`` are on the device of the model; their ``indices`` place the examples in the results, which are in the
    order of the batches.
    """
    attacker = _BatchAttacker(model, attacks, WorkingSize(sys.maxsize), seed)
    outcomes, labels, indices = [], [], []
    with evaluation_mode(model):
        for number, batch in enumerate(batches):
            outcomes.append(attacker(number, batch))
            labels.append(batch.y.cpu())
            indices.append(batch.indices)
    outcome = Outcome(
        torch.cat([outcome.predictions for outcome in outcomes], 1),
        torch.cat([outcome.margins for outcome in outcomes], 1),
        torch.stack([outcome.seconds for outcome in outcomes]).sum(0),
    )
    return _results(model, attacks, outcome, torch.cat(labels), torch.cat(indices), seed=seed, warns=True)


def _results(
    model: nn.Module,
    attacks: Sequence[NamedAttack | ForeignAttack],
    outcome: Outcome,
    labels: Tensor,
    indices: Tensor,
    *,
    seed: int,
    warns: bool,
) -> dict[str, AttackResult]:
    """The rows of an outcome as results by name, unless clean logits are not finite."""
    refuse_not_finite(model, outcome.predictions[0])
    settings = {"clean": dict[str, object]()} | {attack.name: attack.settings(seed) for attack in attacks}
    results = {
        name: AttackResult(
            name=name,
            settings=settings[name],
            predictions=outcome.predictions[position],
            margins=outcome.margins[position],
            labels=labels,
            indices=indices,
            seconds=float(outcome.seconds[position]),
        )
        for position, name in enumerate(settings)
    }
    for name in list(results)[1:] if warns else ():
        warn_of_not_finite(name, results[name].predictions)
    return results


@dataclass(eq=False)
class _BatchAttacker:
    """Clean predictions and margins of a batch, and those under each attack.

    Once the logits of a clean image are not finite, the model is rejected: no further image is attacked, and those
    that would have been count as broken.
    """

    model: nn.Module
    attacks: Sequence[NamedAttack | ForeignAttack]
    size: WorkingSize
    seed: int
    refused: bool = False

    def __call__(self, number: int, batch: PixelBatch) -> Outcome:
        """Predictions and margins (1 + attacks, B) and seconds (1 + attacks,) of the batch with this number."""
        check_pixel_range(batch.x)
        watch = StopWatch(batch.x.device)
        logits = self.size.split(lambda rows: logits_of(self.model, batch.x[rows]), len(batch.y))
        clean, clean_margins = predicted(logits), true_margins(logits, batch.y)
        predictions, margins, seconds = [clean], [clean_margins], [watch.lap()]
        right = (clean == batch.y).nonzero().squeeze(1)
        self.refused = self.refused or bool((clean == NOT_FINITE).any())
        for position, attack in enumerate(self.attacks, start=1):
            attacked, attacked_margins = clean.clone(), clean_margins.clone()
            if self.refused:
                attacked[right] = NOT_FINITE
            elif len(right):
                generator = make_generator(batch.x.device, self.seed, Stream.EVALUATION, position, number)
                logits = self._attack(attack, batch.x[right], batch.y[right], generator)
                attacked[right] = predicted(logits)
                attacked_margins[right] = true_margins(logits, batch.y[right])
            predictions.append(attacked)
            margins.append(attacked_margins)
            seconds.append(watch.lap())
        return Outcome(torch.stack(predictions).cpu(), torch.stack(margins).cpu(), torch.tensor(seconds))

    def _attack(self, attack: NamedAttack | ForeignAttack, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Logits (N, num_classes) at the last iterate, or of the images that a foreign attack returns."""
        if isinstance(attack, ForeignAttack):
            shown, seed = PiecewiseModel(self.model, self.size).eval(), generator.initial_seed()
            found = self.size.whole(lambda: attack.perturb(shown, x, y, seed=seed), len(y))
            return self.size.split(lambda rows: logits_of(self.model, found[rows]), len(y))
        # Of all rows at once and in one layout: the same noise however many rows go through the model at a time.
        start = attack.threat_model.random_start(x, generator)
        layout = memory_layout(self.model)

        def strike(rows: slice) -> Tensor:
            x_adv = attack(
                self.model,
                x[rows].contiguous(memory_format=layout),
                y[rows],
                start=start[rows].contiguous(memory_format=layout),
                loss_fn=LOSSES[attack.loss],
            )
            return logits_of(self.model, x_adv)

        return self.size.split(strike, len(y))


def memory_layout(model: nn.Module) -> torch.memory_format:
    """The layout that the weights of convolutions have; images in a different one would be converted in every pass."""
    weights = [weight for weight in model.parameters() if weight.ndim == 4 and not weight.is_contiguous()]
    channels_last = any(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    return torch.channels_last if channels_last else torch.contiguous_format


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes (N,) int64 of pixels (N, C, H, W), without a gradient; -1 for logits that are not finite."""
    return predicted(logits_of(model, x))


def refuse_not_finite(model: nn.Module, clean: Tensor) -> None:
    """Reject a model whose logits are not finite on clean images, by its predictions (N,) of them.

    Raises:
        NonFiniteLogitsError: with the number of such images and the names of weights that are not finite.
    """
    count = int((clean == NOT_FINITE).sum())
    if not count:
        return
    spoiled = [
        name
        for name, value in chain(model.named_parameters(), model.named_buffers())
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    listed = ", ".join(spoiled[:5]) + (f" and {len(spoiled) - 5} more" if len(spoiled) > 5 else "")
    cause = (
        f"values in {listed} are not finite (a damaged file, or training that diverged)"
        if spoiled
        else "its weights are finite, so numbers overflow in between"
    )
    raise NonFiniteLogitsError(count, len(clean), cause)


def warn_of_not_finite(name: str, predictions: Tensor) -> None:
    """Warn of images (N,) that an attack drove to logits that are not finite."""
    count = int((predictions == NOT_FINITE).sum())
    if count:
        logger.warning(
            "%s: the logits of %d of %d images are not finite under attack; they count as broken and are in no cell "
            "of the confusion matrix",
            name,
            count,
            len(predictions),
        )


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, num_classes) of pixels (N, C, H, W), without a gradient."""
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits


def true_margins(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the true class minus the largest other one, (N,) float32; NaN where a logit is not finite."""
    margins = -margin_loss(full_precision(logits), y).float()
    return margins.where(logits.isfinite().all(1), torch.nan)
