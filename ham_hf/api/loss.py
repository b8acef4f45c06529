"""The adversarial loss of one batch, for your own training loop."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ham_hf.api.loader import check_images
from ham_hf.attacks import Attack, ThreatModel, evaluation_mode, ordinary, outside_inference_mode
from ham_hf.invocation import command
from ham_hf.methods import Batch, Method, RuleMethod, TrainingRows, available
from ham_hf.settings import setting_problems

_SCHEDULE = "_start_epoch"


@dataclass(frozen=True, eq=False, kw_only=True)
class LossRecord:
    """Statistics of one batch on this process.

    Attributes:
        method: the method.
        num_examples: N, images of the batch.
        num_trained_on: E, examples in the loss. If it is 0, so are the loss and its gradient: skip the optimizer's
            step if it is 0 on all processes, as momentum and weight decay would still move the weights.
        hard: (N,) bool, True = misclassified at the mining step; None for methods that do not mine.
    """

    method: str
    num_examples: int
    num_trained_on: int
    hard: Tensor | None

    @property
    def hard_fraction(self) -> float | None:
        """Share of the batch that is hard; None for methods that do not mine."""
        return None if self.hard is None else float(self.hard.float().mean())


class AdversarialLoss(NamedTuple):
    """A loss to call ``backward`` on, with the statistics of its batch."""

    loss: Tensor
    record: LossRecord


def adversarial_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    method: str = "ham",
    threat_model: ThreatModel | None = None,
    num_steps: int = 10,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    **options: object,
) -> AdversarialLoss:
    """Attack a batch and return the loss to train on it.

    The attack uses the model without its DDP wrapper, in evaluation mode, and computes no gradient of a parameter; the
    loss takes one forward through the wrapper, in the mode the model is in. With ``DistributedDataParallel`` the loss
    is scaled so that the gradient that DDP averages is that of the mean over the examples of all processes; a process
    without one joins with a loss of 0. Where gradients are off (``torch.no_grad()``, ``torch.inference_mode()``) the
    loss is a number of this process alone, without a graph, and no process waits for another.

    Warm-up is assumed to be over: first train the warm-up epochs with ``method="pgd_at"``. Checking the range of the
    pixels waits for the device once per call.

    Args:
        model: maps pixels (N, C, H, W) in [0, 1] to logits (N, num_classes), and normalizes by itself; may be wrapped
            in ``DistributedDataParallel`` or ``DataParallel``.
        x: clean images (N, C, H, W) in [0, 1].
        y: labels (N,), int64.
        method: "ham", "pgd_at", "trades", "mart", "bat", "fat" or "gairat".
        threat_model: norm and radius; None = linf 8/255.
        num_steps: K, steps of the attack.
        step_size: length of a step in pixel units; None = a quarter of epsilon.
        generator: source of the random start, on the device of ``x``; None uses torch's global one.
        options: of the method, as in `ham_hf.methods` and ``train_ham.py --help``: ``mining_step=3`` and
            ``easy_weight=0.5`` for "ham", ``beta=6`` for "trades".

    Returns:
        The loss, a scalar, and a record with the hard fraction.

    Raises:
        ValueError: for a batch that is malformed or has pixels outside [0, 1], an unknown method or option, or a
            method that keeps state of the classes over epochs, which needs the trainer (`ham_hf.train`).
    """
    instance = _instance(method, options, num_steps)
    _check(model, x, y)
    threat_model = threat_model or ThreatModel()
    attack = Attack(
        threat_model=threat_model,
        num_steps=num_steps,
        step_size=threat_model.epsilon / 4 if step_size is None else step_size,
    )
    # These methods keep no state of classes: there are none to count.
    states = {keeper.name: keeper.initial_state(torch.empty(0)) for keeper in instance.state_keepers}
    module = unwrapped(model)
    with outside_inference_mode():
        x, y = ordinary(x.detach()), ordinary(y)
        batch = Batch(x=x, y=y, attack=attack, epoch=instance.settled_epoch, states=states, generator=generator)
        rows = instance.rows_to_train_on(module, batch)
        # DDP exchanges buffers in every forward, also in those of a validation, which processes need not make alike.
        forward = model if torch.is_grad_enabled() else module
        loss = _outer_loss(forward, batch, rows, instance)
    record = LossRecord(method=method, num_examples=len(y), num_trained_on=len(rows.y), hard=rows.hard)
    return AdversarialLoss(loss, record)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of the wrappers that share its work out."""
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    return model


def _outer_loss(model: nn.Module, batch: Batch, rows: TrainingRows, method: Method) -> Tensor:
    """Sum of the weighted terms over their divisors, through one forward; 0 where there is nothing to train on."""
    weight, divisor = method.weigh(rows, epoch=batch.epoch, states=batch.states)
    if isinstance(model, DistributedDataParallel):
        # The mean over the examples of all processes, times their number, as DDP takes the mean over processes.
        dist.all_reduce(divisor, group=model.process_group)
        weight = weight * dist.get_world_size(model.process_group)
    if not len(rows.y):
        if not torch.is_grad_enabled():
            return batch.x.new_zeros(())
        # Part of a graph, so that `backward` takes it; with DDP the other processes wait for this one's gradient.
        with evaluation_mode(model):
            idle: Tensor = model(batch.x[:1]).sum() * 0
        return idle
    # BatchNorm needs at least two values, so duplicate a lone row; the logits of the copy are dropped.
    alone = model.training and len(rows.x) == 1
    logits: Tensor = model(rows.x.repeat(2, 1, 1, 1) if alone else rows.x)
    share = weight / torch.where(divisor > 0, divisor, 1)[:, None]
    loss: Tensor = (method.losses(logits[: len(rows.x)], rows) * share).sum()
    return loss


def _check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError(
            "adversarial_loss attacks the whole module on every process, which FullyShardedDataParallel shards: "
            "use DistributedDataParallel, or the trainer (ham_hf.train)"
        )
    check_images(x, y)
    if not len(y):
        raise ValueError("the batch holds no image")


def _instance(method: str, options: Mapping[str, object], num_steps: int) -> Method:
    """The method with these options, checked."""
    kinds = available()
    stateless = [name for name, kind in kinds.items() if not issubclass(kind, RuleMethod)]
    if method not in kinds:
        near = difflib.get_close_matches(method.lower().replace("-", "_"), stateless, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method {method!r}: expected one of {', '.join(stateless)}{hint}")
    if method not in stateless:
        raise ValueError(
            f"method {method!r} keeps state of the classes across epochs, which one batch does not have: train "
            f"with ham_hf.train or {command('train')} --method {method}. In a loop of your own: {', '.join(stateless)}"
        )
    known = [field.name for field in fields(kinds[method]) if field.init]
    usable = [name for name in known if name not in ("class_margin", "class_weighting", "class_rule_args")]
    usable = [name for name in usable if not name.endswith(_SCHEDULE) and name != "pack_hard_examples"]
    for name in [name for name in options if name not in usable]:
        reason = ""
        if name.endswith(_SCHEDULE) and name in known:
            reason = "; a batch has no epoch: call with method='pgd_at' in the epochs before"
        elif name in known:
            reason = "; it needs more than this batch: train with ham_hf.train"
        raise ValueError(f"option {name} of method {method!r}: expected one of {', '.join(usable) or 'none'}{reason}")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps}: expected at least 1")
    instance = kinds[method](**options)
    problems = [problem.removeprefix("--") for problem in setting_problems(instance)]
    if problems:
        raise ValueError("; ".join(problems))
    instance.check(num_steps=num_steps)
    return instance
