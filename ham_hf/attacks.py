"""Threat models and projected gradient descent (Madry et al., ICLR 2018) in pixel space.

A tensor called ``x`` is (N, C, H, W) in [0, 1]; epsilon and step size are in the same pixel units. Arithmetic on ``x``
uses the dtype of ``x`` (float32 in training), whatever precision the model computes in.

An attack puts the module in evaluation mode, restores the mode of every submodule afterwards, and asks autograd for
the gradient of the input alone (`attack_mode`). It computes no parameter gradient and moves no BatchNorm buffer. Pass
the unwrapped module: a DDP wrapper would synchronize at every step.

Logits that are not finite predict no class (`predicted`). An image whose gradient is not finite does not move, so an
attack never leaves ball and box.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Maps logits (N, num_classes) and labels (N,) to one loss per example (N,), which the attack increases."""

NORMS = ("linf", "l2")

NOT_FINITE = -1
"""The predicted class where a logit is not finite: no label, so that it is never right."""

SQUARES_FIT = (1e-16, 1e16)
"""Gradients whose largest entry lies in between have a length in float32: no square vanishes or overflows."""


@dataclass(frozen=True, eq=False)
class ThreatModel:
    """A ball of radius ``epsilon`` around each image, cut by the pixel box [0, 1].

    Attributes:
        norm: "linf" (largest change of a single value) or "l2" (Euclidean length of the change of an image).
        epsilon: radius in pixel units; one number, or an (N,) tensor with one radius per example.

    Raises:
        ValueError: if the norm is unknown, or a scalar epsilon is negative or, for linf, above 1.
    """

    norm: str = "linf"
    epsilon: float | Tensor = 8 / 255

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            spelled = str(self.norm).lower().replace("_", "").replace("∞", "inf")
            near = difflib.get_close_matches(spelled, NORMS, n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}{hint}")
        # A tensor is left unread: looking at its values would synchronize with the device.
        if isinstance(self.epsilon, Tensor):
            return
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(
                f"epsilon {self.epsilon:g} is in units of pixels in [0, 1], at most 1 for linf; did you mean "
                f"{self.epsilon:g}/255?"
            )

    def rows(self, keep: Tensor | slice) -> ThreatModel:
        """The threat model of the rows selected by a mask or index, for a per-example epsilon."""
        return replace(self, epsilon=rows_of(self.epsilon, keep))

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images drawn uniformly from the ball around ``x`` (N, C, H, W), clipped to [0, 1].

        The generator is on the device of ``x``; None uses torch's global one.
        """
        epsilon = per_example(self.epsilon, x)
        if self.norm == "linf":
            noise = torch.empty_like(x).uniform_(-1, 1, generator=generator).mul_(epsilon)
        else:
            # A Gaussian direction and a radius with density ~ r^(d-1) are uniform in the d-dimensional ball.
            noise = torch.empty_like(x).normal_(generator=generator)
            radius = torch.empty(len(x), dtype=x.dtype, device=x.device).uniform_(generator=generator)
            noise.mul_(per_example(radius ** (1 / x[0].numel()), x) * epsilon / l2_norm(noise))
        return noise.add_(x).clamp_(0, 1)

    def step(self, x_adv: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
        """One ascent step of length ``step_size`` (a number or (N,)) along the steepest direction of the norm.

        The result is not projected. A row whose gradient is exactly zero, or not finite, stays where it is. However
        small or large a gradient is, down to a single denormal number, the step has its direction.
        """
        size = per_example(step_size, x_adv)
        direction = finite_rows(gradient).sign() if self.norm == "linf" else l2_direction(gradient)
        return direction.mul_(size).add_(x_adv)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest images to ``x_adv`` that lie in the ball around ``x`` and in the box [0, 1].

        For l2 the ball is met first and the box by clipping; as ``x`` is in the box, clipping shortens the
        perturbation and so leaves the ball's constraint intact.
        """
        epsilon = per_example(self.epsilon, x)
        if self.norm == "linf":
            return torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp_(0, 1)
        delta = x_adv - x
        shrink = (epsilon / l2_norm(delta)).clamp(max=1)
        return delta.mul_(shrink).add_(x).clamp_(0, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Attack:
    """The projected gradient descent that `pgd` runs, in a ball.

    Attributes:
        threat_model: norm and radius.
        num_steps: K.
        step_size: length of a step in pixel units; a number or one per example (N,).
    """

    threat_model: ThreatModel
    num_steps: int
    step_size: float | Tensor

    def as_json(self) -> dict[str, object]:
        """Norm, radius, number and length of steps for a report; radius and length have to be numbers."""
        return {
            "norm": self.threat_model.norm,
            "epsilon": float(self.threat_model.epsilon),
            "num_steps": self.num_steps,
            "step_size": self.step_size,
        }

    def of_classes(self, radius: Tensor, step_size: Tensor, y: Tensor) -> Attack:
        """The attack with the radius and the step (num_classes,) of the class of each example, labels ``y`` (N,)."""
        return replace(self, threat_model=replace(self.threat_model, epsilon=radius[y]), step_size=step_size[y])

    def rows(self, rows: Tensor | slice) -> Attack:
        """The attack on the examples at the given positions, where radius or step are per example."""
        return replace(self, threat_model=self.threat_model.rows(rows), step_size=rows_of(self.step_size, rows))

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        start: Tensor | None = None,
        loss_fn: LossFn | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`pgd` on the pixels ``x`` (N, C, H, W) with labels ``y`` (N,); without a loss, on cross-entropy."""
        return pgd(
            model,
            x,
            y,
            threat_model=self.threat_model,
            num_steps=self.num_steps,
            step_size=self.step_size,
            start=start,
            loss_fn=loss_fn or cross_entropy,
            generator=generator,
        )


def rows_of(value: float | Tensor, rows: Tensor | slice) -> float | Tensor:
    """The entries of some rows of a value per example (N,); a number as it is."""
    return value[rows] if isinstance(value, Tensor) and value.ndim else value


def per_example(value: float | Tensor, x: Tensor) -> float | Tensor:
    """``value``, a number or (N,), in a shape that broadcasts over ``x`` (N, C, H, W); ValueError for other shapes."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape != x.shape[:1]:
        raise ValueError(f"expected one value per example, shape ({len(x)},), got {tuple(value.shape)}")
    return value.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def l2_norm(x: Tensor) -> Tensor:
    """Euclidean length of each row of ``x`` (N, ...) as (N, 1, 1, 1), at least 1e-12 so that it can divide."""
    return per_example(x.flatten(1).norm(dim=1).clamp(min=1e-12), x)  # type: ignore[return-value]


def largest_entry(gradient: Tensor) -> Tensor:
    """Largest absolute value of each row of ``gradient`` (N, ...) as (N, 1, ...); not finite if one of them is not."""
    return gradient.abs().amax(tuple(range(1, gradient.ndim)), keepdim=True)


def finite_rows(gradient: Tensor) -> Tensor:
    """``gradient`` (N, ...) with 0 in every row that has an entry which is not finite; waits for no device."""
    return torch.where(largest_entry(gradient).isfinite(), gradient, 0)


def l2_direction(gradient: Tensor) -> Tensor:
    """Rows of ``gradient`` (N, ...) divided by their Euclidean length; 0 where a row is 0 or not finite.

    Very small or large entries have no squares in float32: such a row is divided by its largest entry first.
    """
    largest = largest_entry(gradient)
    small, large = SQUARES_FIT
    scaled = gradient / torch.where((largest > small) & (largest < large), 1, largest)
    length = per_example(scaled.flatten(1).norm(dim=1), gradient)
    # A row of zeros was divided by 0.
    return torch.where(largest.isfinite() & (largest > 0), scaled / length, 0)


def full_precision(logits: Tensor) -> Tensor:
    """Logits in float32 at least: exponentials and logarithms of half-precision ones are too coarse."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example (N,), in float32 at least; what training attacks increase, as published."""
    return F.cross_entropy(full_precision(logits), y, reduction="none")


def unsaturated_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with the direction that it has in exact arithmetic, for attacks that evaluate (our form).

    Cross-entropy is log(1 + e^u), where u is the logsumexp of the other classes' logits minus the label's. If the
    model is confident, e^u vanishes beside 1: the gradient keeps only the other classes' part, or is exactly 0, and
    the model looks robust. Its direction is that of u. So an example whose probability rounds to 1, in the precision
    of the logits, gets u, which does not saturate; every other one gets `cross_entropy`, bit for bit.

    Args:
        logits: (N, num_classes).
        y: (N,) labels.

    Returns:
        (N,) values to increase, in float32 at least.
    """
    plain, full = cross_entropy(logits, y), full_precision(logits)
    label = y[:, None]
    u = full.scatter(1, label, float("-inf")).logsumexp(1) - full.gather(1, label).squeeze(1)
    sure = plain.detach().neg().exp().to(logits.dtype) == 1
    return torch.where(sure, u, plain)


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Margin of Carlini and Wagner (S&P 2017), max over j != y of z_j minus z_y, (N,); positive = misclassified."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - true


def predicted(logits: Tensor) -> Tensor:
    """Predicted classes (N,) int64 of logits (N, num_classes); `NOT_FINITE` where a logit of the row is not finite.

    To ``argmax`` NaN is the largest value, so that a network of NaN would be right about every image of class 0.
    """
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NOT_FINITE)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode; each one gets its own mode back on leaving, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradient of a parameter; on leaving, each module and parameter is as it was.

    ``torch.autograd.grad`` skips parameters anyway; a compiled network computes the gradient of all that requires one.
    """
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in asked:
        parameter.requires_grad_(False)
    try:
        with evaluation_mode(model):
            yield
    finally:
        for parameter, requires_grad in asked:
            parameter.requires_grad_(requires_grad)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode``, in which autograd records nothing; no gradient is recorded inside.

    Tensors made inside are ordinary. Without inference mode nothing changes.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary(x: Tensor) -> Tensor:
    """``x``, or a copy of it that autograd takes, if it was made in ``torch.inference_mode``."""
    return x.clone() if x.is_inference() else x


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn = cross_entropy) -> Tensor:
    """Gradient of the summed per-example loss with respect to ``x`` alone, in the shape and dtype of ``x``.

    With the sum, a row's gradient does not depend on the batch it is in.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        loss = loss_fn(model(x), y).sum()
        return torch.autograd.grad(loss, x)[0]


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    num_steps: int,
    step_size: float | Tensor,
    start: Tensor | None = None,
    loss_fn: LossFn = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent: ``num_steps`` steps uphill on ``loss_fn``, each projected back.

    A row whose gradient is not finite does not move in that step. The result is in ball and box, and finite, whatever
    the model returns, from the first step on.

    The attack has no memory between steps, so ``pgd(M)`` followed by ``pgd(K - M)`` from its result equals
    ``pgd(K)``, and a row's result does not depend on the other rows.

    It works under ``torch.no_grad()`` and, with weights that were made outside of it, ``torch.inference_mode()``.
    Values are not read, as that would wait for the device: pixels are taken to be in [0, 1].

    Args:
        model: maps pixels (N, C, H, W) in [0, 1] to logits (N, num_classes); not a DDP wrapper.
        x: clean images (N, C, H, W) in [0, 1].
        y: labels (N,).
        threat_model: the ball the result must lie in.
        num_steps: number of steps, >= 0.
        step_size: length of a step in pixel units, a number or (N,).
        start: images to start from, used as they are; None draws them uniformly from the ball.
        loss_fn: loss to increase, per example.
        generator: source of the random start, on the device of ``x``.

    Returns:
        Adversarial images, detached, in the shape and dtype of ``x``.

    Raises:
        ValueError: if ``x`` is not a batch of floating-point images, the labels do not match it, or
            ``num_steps`` is negative.
    """
    check_batch(x, y)
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}")
    with outside_inference_mode(), attack_mode(model):
        x, y = ordinary(x), ordinary(y)
        x_adv = threat_model.random_start(x, generator) if start is None else ordinary(start.detach())
        for _ in range(num_steps):
            gradient = input_gradient(model, x_adv, y, loss_fn)
            x_adv = threat_model.project(threat_model.step(x_adv, gradient, step_size), x)
    return x_adv


def check_batch(x: Tensor, y: Tensor) -> None:
    """Refuse a batch whose ``x`` is not (N, C, H, W) in a floating-point dtype or whose ``y`` is not (N,)."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be (N, C, H, W) floating-point pixels in [0, 1], got {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must hold one label per image, shape ({len(x)},), got {tuple(y.shape)}")


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
