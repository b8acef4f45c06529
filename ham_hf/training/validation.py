"""Measurements on the held-out part of train: accuracy per class, and the sums that class rules ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ham_hf.attacks import Attack, evaluation_mode
from ham_hf.data import BatchRequest, Images
from ham_hf.evaluation import Workplace, evaluate, standard_attacks
from ham_hf.methods import BaseLoss, Batch, ClassRule, statistics_dtype
from ham_hf.metrics import FairnessSummary, summarize
from ham_hf.seeding import Stream, make_generator


@dataclass(frozen=True, kw_only=True)
class HeldOutAccuracy:
    """Accuracy on the held-out part: on clean images, under PGD, and by the verdict of PGD and CW.

    ``verdict`` (right when clean and under both attacks) is None where CW was not run.
    """

    clean: FairnessSummary
    robust: FairnessSummary
    verdict: FairnessSummary | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class HeldOutPart:
    """The held-out images of a run; any number of processes sees the same batches."""

    images: Images
    num_classes: int
    place: Workplace

    def accuracy(self, module: nn.Module, attack: Attack, *, with_verdict: bool = False) -> HeldOutAccuracy:
        """Clean and PGD accuracy of an unwrapped module; the same noise every time, so that epochs can be compared.

        ``with_verdict`` also runs CW with as many steps of the same length, which costs as much as PGD.
        """
        attacks = standard_attacks(attack)[: 2 if with_verdict else 1]
        results = evaluate(module, self.images, attacks, self.place)
        labels = self.images.labels
        right = [result.flags for result in results.values()]
        clean, robust = (summarize(flags, labels, self.num_classes) for flags in right[:2])
        verdict = summarize(right[1] & right[2], labels, self.num_classes) if with_verdict else None
        return HeldOutAccuracy(clean=clean, robust=robust, verdict=verdict)

    def sums(self, rule: ClassRule, module: nn.Module, *, loss: BaseLoss, attack: Attack, epoch: int) -> Tensor:
        """Sums (S, num_classes) that ``rule`` takes over all held-out images, of all processes."""
        accelerator, device = self.place.accelerator, self.place.accelerator.device
        every = list(enumerate(torch.split(torch.arange(len(self.images)), self.place.batch_size)))
        mine = every[accelerator.process_index :: accelerator.num_processes]
        batches = self.images.batches([BatchRequest(indices, None) for _, indices in mine], device=device)
        sums = []
        with evaluation_mode(module):
            for (number, _), batch in zip(mine, batches, strict=True):
                noise = make_generator(device, self.place.seed, Stream.HELD_OUT, epoch, number)
                attacked = Batch(x=batch.x, y=batch.y, attack=attack, epoch=epoch, generator=noise)
                sums.append(rule.held_out_sums(module, attacked, loss=loss, num_classes=self.num_classes))
        own = torch.zeros(rule.num_held_out_sums, self.num_classes, dtype=statistics_dtype(device), device=device)
        if sums:  # a process may have no batch
            own += torch.stack(sums).sum(0)
        total: Tensor = accelerator.reduce(own, "sum")
        return total


def held_out_record(found: HeldOutAccuracy) -> dict[str, object]:
    """The numbers of the held-out part for the log of an epoch."""
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
    """The score that weights are selected by (``--selection_metric``), higher is better; "last" scores ``last``."""
    scores = {
        "robust_accuracy": found.robust.average,
        "worst_class": found.robust.worst_class,
        "robust_plus_worst": found.robust.average + found.robust.worst_class,
        "last": last,
    }
    if found.verdict is not None:
        scores["verdict"] = found.verdict.average
    return scores[metric]
