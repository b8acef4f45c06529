"""Attacks over a split, one flag per example, distributed over processes.

Every process attacks every ``num_processes``-th batch of a fixed partition and draws the noise of a batch from
the batch's number, so the flags do not depend on the number of processes. The model is attacked through its
unwrapped module, in evaluation mode, in the precision it is given in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ham_hf.attacks import LossFn, ThreatModel, cross_entropy, evaluation_mode, margin_loss, pgd
from ham_hf.data import BatchRequest, Images, stratified_subset
from ham_hf.seeding import Stream, derive_seed, make_generator

logger = logging.getLogger(__name__)

LOSSES: dict[str, LossFn] = {"cross-entropy": cross_entropy, "margin": margin_loss}


@dataclass(frozen=True, kw_only=True)
class EvaluationAttack:
    """A PGD attack used to evaluate.

    Attributes:
        name: key of the result, such as "pgd-20".
        num_steps: number of steps.
        step_size: length of a step in pixel units.
        loss: "cross-entropy" (PGD) or "margin" (CW, on the logits).
    """

    name: str
    num_steps: int
    step_size: float
    loss: str = "cross-entropy"


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackResult:
    """Outcome of one attack (or of none: "clean") on every example of a split.

    Attributes:
        name: "clean", "pgd-20", "cw-20", "autoattack", ...
        settings: what was run: norm, epsilon, num_steps, step_size, loss, seed, ...
        flags: (N,) bool, CPU: correct on the clean image and, for an attack, on the attacked one. The adversary may
            leave an image as it is, so an attack never makes an example right.
        predictions: (N,) int64, CPU: predicted class of the attacked image.
        labels: (N,) int64, CPU.
        indices: (N,) int64, CPU: positions of the examples in the split.
        seconds: wall-clock time of this attack, summed over this process's batches.
    """

    name: str
    settings: dict[str, object]
    flags: Tensor
    predictions: Tensor
    labels: Tensor
    indices: Tensor
    seconds: float


def standard_attacks(num_steps: int, step_size: float) -> tuple[EvaluationAttack, EvaluationAttack]:
    """The two attacks every report holds: PGD and CW with the same number and size of steps."""
    return (
        EvaluationAttack(name=f"pgd-{num_steps}", num_steps=num_steps, step_size=step_size),
        EvaluationAttack(name=f"cw-{num_steps}", num_steps=num_steps, step_size=step_size, loss="margin"),
    )


def evaluate(
    model: nn.Module,
    images: Images,
    attacks: Sequence[EvaluationAttack],
    *,
    threat_model: ThreatModel,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
    show_progress: bool = False,
) -> dict[str, AttackResult]:
    """Clean accuracy and the accuracy under each attack, for every example of a split.

    An image that is misclassified as it is counts as lost to every attack and is not attacked.

    Args:
        model: the unwrapped pixel model.
        images: the split.
        attacks: what to run beside "clean".
        threat_model: norm and radius of all attacks.
        accelerator: shares the batches out and gathers the flags.
        batch_size: images per batch and process.
        seed: seed of the random starts.
        show_progress: show a bar on the local main process.

    Returns:
        Results by name, "clean" first; the same on every process.

    Raises:
        ValueError: if the split is empty or holds pixels outside [0, 1].
    """
    if not len(images):
        raise ValueError("there is no example to evaluate on")
    names = ["clean", *(attack.name for attack in attacks)]
    predictions = torch.zeros(len(names), len(images), dtype=torch.long, device=accelerator.device)
    seconds = dict.fromkeys(names, 0.0)
    order = torch.arange(len(images))
    parts = list(enumerate(torch.split(order, batch_size)))[accelerator.process_index :: accelerator.num_processes]
    batches = images.batches([BatchRequest(part, None) for _, part in parts], device=accelerator.device)
    shown = show_progress and accelerator.is_local_main_process
    with evaluation_mode(model):
        for (number, part), batch in tqdm(
            zip(parts, batches, strict=True), total=len(parts), desc="evaluating", unit="batch", disable=not shown
        ):
            check_pixel_range(batch.x)
            rows = part.to(accelerator.device)
            since = time.perf_counter()
            predictions[0, rows] = predict(model, batch.x)
            seconds["clean"] += lap(since, batch.x)
            right = (predictions[0, rows] == batch.y).nonzero().squeeze(1)
            for position, attack in enumerate(attacks, start=1):
                predictions[position, rows] = predictions[0, rows]
                if not len(right):
                    continue
                since = time.perf_counter()
                x_adv = pgd(
                    model,
                    batch.x[right],
                    batch.y[right],
                    threat_model=threat_model,
                    num_steps=attack.num_steps,
                    step_size=attack.step_size,
                    loss_fn=LOSSES[attack.loss],
                    generator=make_generator(accelerator.device, seed, Stream.EVALUATION, position, number),
                )
                predictions[position, rows[right]] = predict(model, x_adv)
                seconds[attack.name] += lap(since, batch.x)
    predictions = accelerator.reduce(predictions, "sum").cpu()
    settings: list[dict[str, object]] = [{}, *(attack_settings(attack, threat_model, seed) for attack in attacks)]
    return {
        name: AttackResult(
            name=name,
            settings=settings[position],
            flags=predictions[position] == images.labels,
            predictions=predictions[position],
            labels=images.labels,
            indices=order,
            seconds=seconds[name],
        )
        for position, name in enumerate(names)
    }


def attack_settings(attack: EvaluationAttack, threat_model: ThreatModel, seed: int) -> dict[str, object]:
    """What a report says of a PGD attack; JSON types only."""
    return {
        "norm": threat_model.norm,
        "epsilon": float(threat_model.epsilon),
        "num_steps": attack.num_steps,
        "step_size": attack.step_size,
        "loss": attack.loss,
        "random_start": True,
        "restarts": 1,
        "seed": seed,
    }


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes (N,) int64 of pixels (N, C, H, W), without a gradient."""
    with torch.no_grad():
        prediction: Tensor = model(x).argmax(1)
    return prediction


def check_pixel_range(x: Tensor) -> None:
    """Refuse pixels that are not in [0, 1]: an epsilon in pixel units would mean something else for them.

    Raises:
        ValueError: if a value is outside [0, 1] or not a number.
    """
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"pixels must lie in [0, 1], got values from {float(low):g} to {float(high):g}; "
            "normalization belongs into the model (PixelModel), not into the data"
        )


def lap(since: float, x: Tensor) -> float:
    """Seconds since ``since``, after the device of ``x`` has finished its queue."""
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
    return time.perf_counter() - since


def autoattack_version(num_classes: int) -> tuple[str, list[str], int]:
    """Which attacks of AutoAttack exist for this many classes, what to call the set, and the number of targets.

    The targeted attacks of the standard set need four classes, the DLR loss three.
    """
    if num_classes >= 4:
        return "standard", ["apgd-ce", "apgd-t", "fab-t", "square"], min(9, num_classes - 1)
    if num_classes == 3:
        return "standard without targeted attacks (3 classes)", ["apgd-ce", "apgd-dlr", "fab", "square"], 2
    return "standard without targeted attacks and DLR (2 classes)", ["apgd-ce", "fab", "square"], 1


def require_autoattack() -> type:
    """The AutoAttack class of pyautoattack.

    Raises:
        ValueError: naming the extra to install, if the package is absent.
    """
    try:
        from pyautoattack import AutoAttack
    except ModuleNotFoundError as error:
        raise ValueError('--autoattack needs the package pyautoattack: pip install "ham-hf[autoattack]"') from error
    kind: type = AutoAttack
    return kind


def evaluate_autoattack(
    model: nn.Module,
    images: Images,
    *,
    num_classes: int,
    threat_model: ThreatModel,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
    num_examples: int | None = None,
) -> AttackResult:
    """Run AutoAttack (Croce and Hein, ICML 2020; the authors' code, from pyautoattack) over a split.

    Args:
        model: the unwrapped pixel model.
        images: the split.
        num_classes: number of logits; with fewer than four the attacks that cannot exist are left out.
        threat_model: norm and radius.
        accelerator: shares the examples out and gathers the flags.
        batch_size: images per batch and process.
        seed: seed of every attack. Random starts of the same example differ with the number of processes.
        num_examples: size of a stratified subset of the split; None takes all of it.

    Raises:
        ValueError: if pyautoattack is not installed.
    """
    version, attacks, num_targets = autoattack_version(num_classes)
    norm = {"linf": "Linf", "l2": "L2"}[threat_model.norm]
    device = accelerator.device
    if num_examples is None or num_examples >= len(images):
        chosen = torch.arange(len(images))
    else:
        chosen = stratified_subset(images.labels, num_examples, derive_seed(seed, Stream.AUTOATTACK))
    labels = images.labels[chosen]
    mine = torch.arange(len(chosen))[accelerator.process_index :: accelerator.num_processes]
    predictions = torch.zeros(len(chosen), dtype=torch.long, device=device)
    since = time.perf_counter()
    if len(mine):
        batches = list(
            images.batches([BatchRequest(chosen[part], None) for part in torch.split(mine, batch_size)], device=device)
        )
        adversary = require_autoattack()(
            model,
            attacks=attacks,
            device=device,
            eps=float(threat_model.epsilon),
            norm=norm,
            seed=derive_seed(seed, Stream.AUTOATTACK) % 2**32,
            version="custom",
        )
        # "custom" leaves the restarts of the constructor; these are the standard version's.
        adversary.apgd.n_restarts = adversary.fab.n_restarts = adversary.apgd_targeted.n_restarts = 1
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = num_targets
        with evaluation_mode(model):
            _, predicted = adversary.run_standard_evaluation(
                torch.cat([batch.x for batch in batches]),
                torch.cat([batch.y for batch in batches]),
                batch_size=batch_size,
            )
        predictions[mine.to(device)] = predicted.to(device)
    predictions = accelerator.reduce(predictions, "sum").cpu()
    return AttackResult(
        name="autoattack",
        settings={
            "norm": threat_model.norm,
            "epsilon": float(threat_model.epsilon),
            "version": version,
            "attacks": attacks,
            "seed": seed,
            "num_examples": len(chosen),
            "subset": len(chosen) < len(images),
        },
        flags=predictions == labels,
        predictions=predictions,
        labels=labels,
        indices=chosen,
        seconds=time.perf_counter() - since,
    )
