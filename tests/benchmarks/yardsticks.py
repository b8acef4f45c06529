"""Yardsticks for our steps, written out plainly.

Cost in passes over a full batch: a forward 1, a gradient for the input 1 more, a backward that fills the gradients of
the parameters too 2 more. With K attack steps, mining at step M and a share h of hard rows:

    published step   2 + 4 M + 4 (K - M) h + 3 h    29.5 at K = 10, M = 3, h = 0.5
    careful step     3 M + 1 + 3 (K - M) h + 3 h    22
    floor            2 M + 1 + 2 (K - M) h + 3 h    15.5
    floor of PGD-AT  2 K + 3                        23
    ordinary step    3
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Linf PGD with mining: radius and step in pixel units, K steps, mining at step M."""

    epsilon: float
    step_size: float
    num_steps: int
    mining_step: int


def published_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, attack: Attack) -> int:
    """A step of HAM as the published code makes it (official repository, commit e3ee5ff, read and written anew).

    Two forwards at the start whose logits nobody needs, with their graphs; noise drawn by numpy in float64; in every
    attack step a backward that fills all gradients of parameters, and another forward, one of which classifies.

    Returns:
        The number of hard rows.
    """
    model.eval()
    x_adv = numpy_start(x, attack)
    model(x)
    model(x_adv)
    for number in range(1, attack.num_steps + 1):
        x_adv = backward_step(model, x_adv, x, y, attack)
        with torch.no_grad():
            logits = model(x_adv)
        if number == attack.mining_step:
            hard = logits.argmax(1) != y
            x_adv, x, y = x_adv[hard], x[hard], y[hard]
    ordinary_step(model, optimizer, x_adv, y)
    return len(y)


def careful_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, attack: Attack) -> int:
    """The same without the forwards that can be spared: one is left, to classify at the mining step."""
    model.eval()
    x_adv = numpy_start(x, attack)
    for number in range(1, attack.num_steps + 1):
        x_adv = backward_step(model, x_adv, x, y, attack)
        if number == attack.mining_step:
            with torch.no_grad():
                hard = model(x_adv).argmax(1) != y
            x_adv, x, y = x_adv[hard], x[hard], y[hard]
    ordinary_step(model, optimizer, x_adv, y)
    return len(y)


def numpy_start(x: Tensor, attack: Attack) -> Tensor:
    """A random start from numpy, in float64 on the CPU, then cast and moved."""
    noise = np.random.uniform(-attack.epsilon, attack.epsilon, tuple(x.shape))
    return (x + torch.from_numpy(noise).float().to(x.device)).clamp(0, 1)


def backward_step(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
    """One attack step with ``.backward()``, which computes the gradients of all parameters, to be thrown away."""
    x_adv = x_adv.detach().requires_grad_(True)
    model.zero_grad()
    F.cross_entropy(model(x_adv), y).backward()
    x_adv = x_adv.detach() + attack.step_size * x_adv.grad.sign()
    return torch.min(torch.max(x_adv, x - attack.epsilon), x + attack.epsilon).clamp(0, 1)


def ordinary_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """An ordinary training step: forward, backward, update."""
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@dataclass(frozen=True)
class Floor:
    """Bare passes over a network: no loss, no step of the attack, no update.

    Attributes:
        model: the network, in the memory layout that is fastest for it.
        precision: "fp32" or "bf16" (autocast) of the training pass.
        attack_precision: the same of the attack's passes.
    """

    model: nn.Module
    precision: str = "fp32"
    attack_precision: str = "fp32"

    def ham(self, x: Tensor, hard: Tensor, attack: Attack) -> None:
        """M input gradients of all rows, one classification, K - M input gradients and one training pass of the hard.

        Args:
            x: all rows.
            hard: as many rows as are hard; which ones does not matter here.
            attack: for K and M.
        """
        with self._frozen():
            for _ in range(attack.mining_step):
                self.input_gradient(x)
            self.forward(x)
            for _ in range(attack.num_steps - attack.mining_step):
                self.input_gradient(hard)
        self.training_pass(hard)

    def pgd_at(self, x: Tensor, attack: Attack) -> None:
        """K input gradients and one training pass of all rows."""
        with self._frozen():
            for _ in range(attack.num_steps):
                self.input_gradient(x)
        self.training_pass(x)

    def evaluation(self, x: Tensor, num_steps: int) -> None:
        """The passes of a PGD evaluation: an input gradient for every step, and a forward at the end."""
        with self._frozen():
            for _ in range(num_steps):
                self.input_gradient(x)
            self.forward(x)

    def forward(self, x: Tensor) -> None:
        with torch.no_grad(), autocast(x, self.attack_precision):
            self.model(x)

    def input_gradient(self, x: Tensor) -> None:
        x = x.detach().requires_grad_(True)
        with autocast(x, self.attack_precision):
            logits = self.model(x)
        torch.autograd.grad(logits.sum(), x)

    def training_pass(self, x: Tensor) -> None:
        self.model.train().zero_grad()
        with autocast(x, self.precision):
            logits = self.model(x)
        logits.sum().backward()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Evaluation mode and parameters without gradients: autograd then keeps the least it can."""
        self.model.eval().requires_grad_(False)
        try:
            yield
        finally:
            self.model.requires_grad_(True)


def autocast(x: Tensor, precision: str) -> AbstractContextManager[None]:
    """Autocast to bfloat16 on the device of ``x`` if the precision is "bf16"."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")


class PassCounter:
    """Counts the passes of a network, in rows, while it is open: forwards, and backwards with and without parameters.

    Args:
        model: a network called with one batch; its first parameter stands for all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.forward_rows = self.backward_rows = self.parameter_rows = 0
        self._rows = 0
        self._handles = [
            model.register_forward_hook(self._forward),
            next(model.parameters()).register_post_accumulate_grad_hook(self._parameter),
        ]

    def passes(self, batch_size: int) -> float:
        """Passes over a full batch: every forward and every kind of gradient counts 1."""
        return (self.forward_rows + self.backward_rows + self.parameter_rows) / batch_size

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.forward_rows += len(inputs[0])
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self._rows = len(gradient)
        self.backward_rows += self._rows

    def _parameter(self, parameter: Tensor) -> None:
        self.parameter_rows += self._rows
