"""A fairer model without training: one number per class, added to the logits (`ham_hf.evaluation.calibration`)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ham_hf.api.evaluation import count_logits, device_of, one_process
from ham_hf.api.loader import Loader, class_names_of, held_images
from ham_hf.api.loss import unwrapped
from ham_hf.attacks import ThreatModel, outside_inference_mode
from ham_hf.data import BatchRequest
from ham_hf.evaluation.batch_sharing import Workplace
from ham_hf.evaluation.calibration import (
    Calibration,
    FrontierPoint,
    ShiftedLogits,
    calibrate as find_shifts,
    check_held_out,
)
from ham_hf.evaluation.config import CalibrationConfig
from ham_hf.evaluation.robustness import logits_of
from ham_hf.models.head import SHIFTED_LOGITS_TOLERANCE, HeadError, fold_shifts
from ham_hf.reporting.formats import text_table
from ham_hf.reporting.tables import frontier_rows

logger = logging.getLogger(__name__)

TRIED_IMAGES = 8
"""Images on which a folded model is compared with the shifted logits."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class CalibratedModel:
    """A model with class shifts, and what the dial of fairness gives; ``print`` shows the frontier.

    Attributes:
        model: maps pixels to shifted logits, in evaluation mode. The one that was given is not changed.
        folded: whether the shifts are in the bias of the head of a timm network, which stays plain timm; otherwise
            ``model`` is a wrapper that adds them.
        class_names: names of the C classes in label order.
        calibration: shifts, counts and frontier, with what was measured.
    """

    model: nn.Module
    folded: bool
    class_names: tuple[str, ...]
    calibration: Calibration

    @property
    def shifts(self) -> Tensor:
        """(C,) float32, added to the logits."""
        return torch.tensor(self.calibration.shifts)

    @property
    def frontier(self) -> tuple[FrontierPoint, ...]:
        """Average and worst classes under attack by growing fairness, each cross-fitted."""
        return self.calibration.frontier

    def __str__(self) -> str:
        """The frontier as a table; the point of the shifts is marked."""
        num = sum(self.calibration.counts)
        where = "folded into the head's bias" if self.folded else "added by a wrapper"
        title = f"CW on {num} held-out images, percent with 95 % intervals; shifts {where}"
        return f"{title}\n\n{text_table(frontier_rows(self.calibration))}"

    __repr__ = __str__


def calibrate(
    model: nn.Module,
    loader: Loader,
    *,
    fairness: float | None = None,
    max_average_drop: float | None = None,
    threat_model: ThreatModel | None = None,
    num_steps: int = 10,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> CalibratedModel:
    """Find one shift per class that spreads robust accuracy more evenly.

    Takes at most 880 passes of each image with 10 steps (1,100 for ``max_average_drop``), kept in memory; nothing is
    trained. Give images that the model was not trained on, not those of the test, at least 20 of each class with any.

    Args:
        model: maps pixels (N, C, H, W) in [0, 1] to logits (N, num_classes); without shifts of an earlier calibration,
            which would add up.
        loader: held-out images, as for `ham_hf.evaluate`.
        fairness: 0 leaves the model as it is, 1 asks for all classes alike; None = 0.5 unless the next is given.
        max_average_drop: instead, the largest fairness whose average falls by at most this much, in [0, 1].
        threat_model: norm and radius; None = linf 8/255.
        num_steps: steps of the attack, CW.
        class_names: in label order; None takes those of the loader's dataset, or numbers.
        device: where to compute; None = where the model is. The model is moved there.
        batch_size: images at once.
        seed: of the random starts and of the two halves of the cross-fitting.

    Raises:
        ValueError: for pixels outside [0, 1], too few images of a class, or a setting out of range.
    """
    if fairness is None and max_average_drop is None:
        fairness = 0.5
    config = CalibrationConfig(fairness=fairness, max_average_drop=max_average_drop, calibration_num_steps=num_steps)
    model = unwrapped(model) if device is None else unwrapped(model).to(device)
    device = device_of(model)
    place = Workplace(accelerator=one_process(device), batch_size=batch_size, seed=seed)
    with outside_inference_mode():
        images = held_images(loader)
        first = BatchRequest(torch.arange(min(TRIED_IMAGES, len(images))), None)
        tried = next(images.batches([first], device=device)).x
        num_classes = count_logits(model, tried)
        names = class_names_of(loader, class_names, num_classes)
        for label in map(int, images.labels.aminmax()):
            if not 0 <= label < num_classes:
                raise ValueError(f"label {label}: the model has {num_classes} logits, 0 to {num_classes - 1}")
        check_held_out(images.labels, names, how="give the loader more images")
        found = find_shifts(
            model, images, config, place, threat_model=threat_model or ThreatModel(), num_classes=num_classes
        )
        shifted, is_folded = _shifted(model, torch.tensor(found.shifts), tried)
    return CalibratedModel(model=shifted, folded=is_folded, class_names=names, calibration=found)


def _shifted(model: nn.Module, shifts: Tensor, tried: Tensor) -> tuple[nn.Module, bool]:
    """A copy with the shifts in the bias of the timm network inside, or else a wrapper; and whether it is that."""
    original = copy.deepcopy(model).eval()
    folded = copy.deepcopy(original)
    networks = [module for module in folded.modules() if hasattr(module, "pretrained_cfg")]
    reason = "it holds no timm network"
    if networks:
        try:
            fold_shifts(networks[0], shifts)
        except HeadError as error:
            reason = str(error)
        else:
            wanted = logits_of(original, tried) + shifts.to(tried.device)
            difference = (logits_of(folded, tried) - wanted).abs().max().item()
            if difference <= SHIFTED_LOGITS_TOLERANCE * max(1.0, wanted.abs().max().item()):
                return folded, True
            reason = f"with the shifts in its bias, its logits differ by {difference:.2g} from the shifted ones"
    logger.info("the shifts are added by a wrapper around the model: %s", reason)
    wrapper = ShiftedLogits(original, len(shifts)).eval()
    wrapper.shift.copy_(shifts)
    return wrapper, False
