"""AutoAttack (Croce and Hein, ICML 2020; the authors' code, from pyautoattack), shared out and resumable.

Its attacks run one after the other, each on the images that the earlier ones left, as the authors run them. Here every
attack is finished on all processes before the next one starts; the images left are cut into full batches. The seed of
a batch follows from attack and batch, so the flags depend neither on the number of processes nor on where an
evaluation was interrupted, and a process holds one batch at a time.

The authors' attacks use argmax alone, to which NaN is the largest logit; `GuardedModel` hides such logits from them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel, attack_mode, check_pixel_range, finite_rows, predicted
from ham_hf.data import Images, PixelBatch, stratified_subset
from ham_hf.evaluation.batch_sharing import Outcome, PiecewiseModel, SharedBatches, StopWatch, WorkingSize, Workplace
from ham_hf.evaluation.robustness import AttackResult, logits_of, refuse_not_finite, true_margins, warn_of_not_finite
from ham_hf.seeding import TEST_SEED, Stream, derive_seed

logger = logging.getLogger(__name__)


def autoattack_version(num_classes: int) -> tuple[str, list[str], int]:
    """Name of the AutoAttack set for this many classes, its attacks, and the number of targets.

    The targeted attacks of the standard set need four classes, the DLR loss three.
    """
    if num_classes >= 4:
        return "standard", ["apgd-ce", "apgd-t", "fab-t", "square"], min(9, num_classes - 1)
    if num_classes == 3:
        return "standard without targeted attacks (3 classes)", ["apgd-ce", "apgd-dlr", "fab", "square"], 2
    return "standard without targeted attacks and DLR (2 classes)", ["apgd-ce", "fab", "square"], 1


def require_autoattack() -> type:
    """The AutoAttack class of pyautoattack; ValueError names the extra to install, if the package is absent."""
    try:
        from pyautoattack import AutoAttack
    except ModuleNotFoundError as error:
        raise ValueError('--autoattack needs the package pyautoattack: pip install "ham-hf[autoattack]"') from error
    kind: type = AutoAttack
    return kind


def evaluate_autoattack(
    model: nn.Module,
    images: Images,
    place: Workplace,
    *,
    num_classes: int,
    threat_model: ThreatModel,
    num_examples: int | None = None,
) -> AttackResult:
    """Run AutoAttack over a split.

    A batch that does not fit into the memory of the device goes through the model in parts; noise is drawn for
    the whole batch, so that the result is the same. The margin of an image that falls is that of the adversarial one;
    that of an image that withstands is the clean one, which the authors' attacks return where they do not succeed.

    With fewer than four logits of the unwrapped pixel model, the attacks that cannot exist are left out.
    ``num_examples`` is the size of a stratified subset of the split, the same for every seed; None takes all of it.

    Raises:
        ValueError: if pyautoattack is not installed, or the split holds pixels outside [0, 1].
        NonFiniteLogitsError: if the logits of a clean image are not finite.
        RuntimeError: the allocator's, if not even one image fits into memory.
    """
    version, attacks, num_targets = autoattack_version(num_classes)
    chosen = torch.arange(len(images))
    if num_examples is not None and num_examples < len(images):
        chosen = stratified_subset(images.labels, num_examples, derive_seed(TEST_SEED, Stream.AUTOATTACK))
    settings: dict[str, object] = {
        **{"norm": threat_model.norm, "epsilon": float(threat_model.epsilon), "version": version, "attacks": attacks},
        **{"seed": place.seed, "num_examples": len(chosen), "subset": len(chosen) < len(images)},
    }
    key, size = place.key(model, images), WorkingSize(place.batch_size)
    guarded = GuardedModel(PiecewiseModel(model, size))
    adversary = _standard_adversary(guarded, threat_model, attacks, num_targets, place.accelerator.device)
    labels, accuracy = images.labels[chosen], dict[str, float]()
    # All count as right until "clean" has classified them.
    predictions, margins, seconds = labels.clone(), torch.zeros(len(labels)), 0.0
    with attack_mode(model):
        for name in ("clean", *attacks):
            left = (predictions == labels).nonzero().squeeze(1)
            rows = torch.split(chosen[left], place.batch_size) if len(left) else []
            found = _stage(adversary, name, rows, images, place, size=size, key=key, settings=settings)
            predictions[left], margins[left] = found.predictions[0, chosen[left]], found.margins[0, chosen[left]]
            seconds += float(found.seconds)
            accuracy[name] = float((predictions == labels).double().mean())
            if name == "clean":
                refuse_not_finite(model, predictions)
    if place.accelerator.is_main_process:
        from pyautoattack.checks import check_square_sr

        # The authors' last check: a black-box attack that finds much more than the others hints at masked gradients.
        check_square_sr(accuracy, logger=logging.getLogger("auto-attack"))
        warn_of_not_finite("autoattack", predictions)
    return AttackResult(
        name="autoattack",
        settings=settings,
        predictions=predictions,
        margins=margins,
        labels=labels,
        indices=chosen,
        seconds=seconds,
    )


class GuardedModel(nn.Module):
    """A wrapper that shows finite logits and finite gradients to third-party attacks, on images x with labels y.

    An image whose logits are not finite is shown with those of a wrong class, so that an attack that finds it has
    found something; the gradient of a row is 0 if it is not finite. What is finite is shown as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.x, self.y = torch.empty(0), torch.empty(0, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (M, num_classes) of images (M, C, H, W) near those under attack."""
        if torch.is_grad_enabled() and x.requires_grad:
            x = x.view_as(x)
            x.register_hook(finite_rows)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(x)
        finite = logits.isfinite().all(1)
        # The authors' attacks wait for the device in every step anyway.
        if bool(finite.all()):
            return logits
        pixels = x.detach().flatten(1)
        label = self.y[torch.cdist(pixels, self.x.flatten(1), p=torch.inf).argmin(1)]
        # Pixels that are not finite are not an image: showing their logits as wrong would count them as found.
        shown = (label + pixels.isfinite().all(1).long()) % logits.shape[1]
        return torch.where(finite[:, None], logits, nn.functional.one_hot(shown, logits.shape[1]).to(logits.dtype))


def _standard_adversary(
    model: nn.Module, threat_model: ThreatModel, attacks: list[str], num_targets: int, device: torch.device
) -> Any:  # noqa: ANN401 (the package has no types)
    """The authors' object with the attacks of the standard version, for any number of classes."""
    adversary = require_autoattack()(
        model,
        attacks=attacks,
        device=device,
        eps=float(threat_model.epsilon),
        norm={"linf": "Linf", "l2": "L2"}[threat_model.norm],
        seed=0,
        version="custom",
    )
    # "custom" leaves the restarts of the constructor; these are the standard version's.
    adversary.apgd.n_restarts = adversary.fab.n_restarts = adversary.apgd_targeted.n_restarts = 1
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = num_targets
    return adversary


def _stage(
    adversary: Any,  # noqa: ANN401
    name: str,
    rows: Sequence[Tensor],
    images: Images,
    place: Workplace,
    *,
    size: WorkingSize,
    key: str,
    settings: Mapping[str, object],
) -> Outcome:
    """The outcome of one of the attacks, or of none ("clean"), on batches of these rows."""
    shared = SharedBatches(
        f"autoattack-{name}", rows, shape=(1, len(images)), place=place, key=key, settings={"autoattack": settings}
    )
    for number, batch in shared.of(images):
        watch = StopWatch(batch.x.device)
        adversary.model.x, adversary.model.y = batch.x, batch.y
        if name == "clean":
            logits = _classify(adversary, size, batch, checks=number == 0)
        else:
            position = adversary.attacks_to_run.index(name)
            logits = _strike(
                adversary, name, size, batch, derive_seed(place.seed, Stream.AUTOATTACK, position, number)
            )
        margin = true_margins(logits, batch.y)
        shared.add(number, Outcome(predicted(logits)[None], margin[None], torch.tensor([watch.lap()])))
    return shared.gather()


def _classify(adversary: Any, size: WorkingSize, batch: PixelBatch, *, checks: bool) -> Tensor:  # noqa: ANN401
    """Logits of a clean batch, which may also go through the authors' checks of the model."""
    check_pixel_range(batch.x)
    x = batch.x
    if checks:
        # Without an attack, only the checks are left: they log what makes an evaluation doubtful.
        attacks, adversary.attacks_to_run = adversary.attacks_to_run, []
        size.whole(lambda: adversary.run_standard_evaluation(x, batch.y, batch_size=len(x)), len(x))
        adversary.attacks_to_run = attacks
    return size.whole(lambda: logits_of(adversary.model.model, x), len(x))


def _strike(adversary: Any, name: str, size: WorkingSize, batch: PixelBatch, seed: int) -> Tensor:  # noqa: ANN401
    """Logits of what one of the attacks makes of a batch; images that withstand are as they were."""
    x = batch.x
    attack = {
        "apgd-ce": adversary.apgd,
        "apgd-dlr": adversary.apgd,
        "apgd-t": adversary.apgd_targeted,
        "fab": adversary.fab,
        "fab-t": adversary.fab,
        "square": adversary.square,
    }[name]
    attack.seed = seed % 2**32
    if attack is adversary.apgd:
        attack.loss = name.removeprefix("apgd-")
    if attack is adversary.fab:
        attack.targeted = name == "fab-t"

    def strike() -> Tensor:
        with torch.no_grad():
            x_adv: Tensor = attack.perturb(x.clone(), batch.y.clone())
        # An image with a pixel that is not finite is none that an adversary could show.
        real = x_adv.flatten(1).isfinite().all(1).view(-1, 1, 1, 1)
        return logits_of(adversary.model.model, torch.where(real, x_adv, x))

    return size.whole(strike, len(x))
