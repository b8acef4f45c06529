"""What is measured on the held-out part of train: accuracy per class, and the sums that class rules ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ham_hf.attacks import Attack, evaluation_mode
from ham_hf.data import BatchRequest, Images
from ham_hf.evaluation import EvaluationAttack, evaluate
from ham_hf.methods import ClassRule, Method
from ham_hf.metrics import FairnessSummary, summarize
from ham_hf.seeding import Stream, make_generator


@dataclass(frozen=True, kw_only=True)
class HeldOutAccuracy:
    """Accuracy on the held-out part: of the images as they are, under PGD, and by the verdict of PGD and CW.

    ``verdict`` (right as it is and under both attacks) is None where CW was not run.
    """

    clean: FairnessSummary
    robust: FairnessSummary
    verdict: FairnessSummary | None = None


def held_out_accuracy(
    module: nn.Module,
    images: Images,
    *,
    attack: Attack,
    num_steps: int,
    num_classes: int,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
    with_verdict: bool = False,
) -> HeldOutAccuracy:
    """Clean and PGD accuracy of a module; the same noise every time, so that epochs can be compared.

    Args:
        module: the unwrapped pixel model.
        images: the held-out part.
        attack: its threat model and step size are used.
        num_steps: PGD steps.
        num_classes: number of classes.
        accelerator: shares the batches out.
        batch_size: images per batch and process.
        seed: the run's seed.
        with_verdict: also run CW with as many steps of the same length, which costs as much as PGD.
    """
    step_size = float(attack.step_size)
    attacks = [EvaluationAttack(name="pgd", num_steps=num_steps, step_size=step_size)]
    if with_verdict:
        attacks.append(EvaluationAttack(name="cw", num_steps=num_steps, step_size=step_size, loss="margin"))
    results = evaluate(
        module,
        images,
        attacks,
        threat_model=attack.threat_model,
        accelerator=accelerator,
        batch_size=batch_size,
        seed=seed,
    )
    clean, robust = (summarize(results[name].flags, images.labels, num_classes) for name in ("clean", "pgd"))
    verdict = None
    if with_verdict:
        verdict = summarize(results["pgd"].flags & results["cw"].flags, images.labels, num_classes)
    return HeldOutAccuracy(clean=clean, robust=robust, verdict=verdict)


def held_out_record(found: HeldOutAccuracy) -> dict[str, object]:
    """What the log of an epoch says of the held-out part."""
    record: dict[str, object] = {
        "clean_accuracy": found.clean.average,
        "robust_accuracy": found.robust.average,
        "worst_class": found.robust.worst_class,
        "clean_per_class": [entry.accuracy for entry in found.clean.per_class],
        "robust_per_class": [entry.accuracy for entry in found.robust.per_class],
    }
    if found.verdict is not None:
        record |= {
            "verdict": found.verdict.average,
            "verdict_worst_class": found.verdict.worst_class,
            "verdict_per_class": [entry.accuracy for entry in found.verdict.per_class],
        }
    return record


def selection_score(found: HeldOutAccuracy, metric: str, *, last: float) -> float:
    """What weights are selected by; higher is better.

    Args:
        found: on the held-out part.
        metric: ``selection_metric`` of the run.
        last: the score of "last".

    Raises:
        ValueError: if ``metric`` is "verdict" and CW was not run.
    """
    if metric == "verdict":
        if found.verdict is None:
            raise ValueError("--selection_metric verdict needs the held-out images attacked by CW too")
        return found.verdict.average
    return {
        "robust_accuracy": found.robust.average,
        "worst_class": found.robust.worst_class,
        "robust_plus_worst": found.robust.average + found.robust.worst_class,
        "last": last,
    }[metric]


def held_out_sums(
    rule: ClassRule,
    module: nn.Module,
    images: Images,
    *,
    objective: Method,
    attack: Attack,
    num_classes: int,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """Sums (S, num_classes) that ``rule`` takes over all held-out images, of all processes.

    Batches and their noise do not depend on the number of processes.

    Args:
        rule: the class rule that asks.
        module: the unwrapped pixel model with the current weights.
        images: the held-out part.
        objective: the method that trains, whose loss the sums may use.
        attack: the attack of the inner maximization.
        num_classes: number of classes.
        accelerator: shares the batches out and adds the sums up.
        batch_size: images per batch and process.
        seed: the run's seed.
        epoch: 0-based epoch, for the noise.
    """
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    every = list(enumerate(torch.split(torch.arange(len(images)), batch_size)))
    # A process without a batch takes the first one for the shape of the sums, and counts it for nothing.
    mine, counts = (every[rank::world], 1) if len(every) > rank else (every[:1], 0)
    batches = images.batches([BatchRequest(indices, None) for _, indices in mine], device=device)
    sums = []
    with evaluation_mode(module):
        for (number, _), batch in zip(mine, batches, strict=True):
            found = rule.held_out_sums(
                module,
                batch.x,
                batch.y,
                attack=attack,
                loss=objective.loss,
                num_classes=num_classes,
                generator=make_generator(device, seed, Stream.HELD_OUT, epoch, number),
            )
            sums.append(found * counts)
    total: Tensor = accelerator.reduce(torch.stack(sums).sum(0), "sum")
    return total
