"""Attacks of other libraries: any function ``attack(model, x, y) -> x_adv``, checked before it counts.

The function is given the pixel model in evaluation mode and the images that are classified correctly, and has to keep
to the threat model of the evaluation by itself. Its results are checked: an attack of a different radius would give a
number that looks like the others and is not comparable. Afterwards the model is restored.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel, attack_mode
from ham_hf.data.pixels import isolated_rng
from ham_hf.files import sha256

AttackFunction: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``attack(model, x, y)``: pixels (N, C, H, W) in [0, 1] and labels (N,) to adversarial pixels of the same shape."""

ALLOWANCE = 1e-5
"""How far beyond ball and box a pixel, or the length of a change, may be by rounding (our choice)."""
RESERVED_NAMES = ("clean", "verdict", "autoattack")


class ForeignAttackError(ValueError):
    """A foreign attack returned images outside the threat model, or something else, or changed the model."""


@dataclass(frozen=True, kw_only=True)
class ForeignAttack:
    """An attack from outside this package.

    Attributes:
        name: key of the result: letters, digits and ``. + -``.
        function: see `AttackFunction`. It may draw from the global random states of Python, numpy and torch.
        source: where the function is from, for the report.
        sha256: of the file it is defined in; None where there is none.
        threat_model: what its results are checked against; an evaluation puts its own here.

    Raises:
        ValueError: for a name that cannot be one, or something that cannot be called.
    """

    name: str
    function: AttackFunction
    source: str
    sha256: str | None = None
    threat_model: ThreatModel = field(default_factory=ThreatModel)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]{0,60}", self.name, flags=re.ASCII) or self.name in RESERVED_NAMES:
            raise ValueError(
                f"foreign attack {self.name!r}: expected a name of letters, digits and . + -, at most 61, other than "
                f"{', '.join(RESERVED_NAMES)}"
            )
        if not callable(self.function):
            raise ValueError(
                f"foreign attack {self.name}: {self.source} is {type(self.function).__name__}, and a function "
                "attack(model, x, y) that returns the attacked images is needed"
            )

    def settings(self, seed: int) -> dict[str, object]:
        """The attack's settings as a report shows them; JSON types only."""
        return {
            "norm": self.threat_model.norm,
            "epsilon": float(self.threat_model.epsilon),
            "function": self.source,
            "sha256": self.sha256,
            "seed": seed,
        }

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        """Attacked images, in ball and box, of ``x`` (N, C, H, W) in [0, 1] with labels ``y`` (N,).

        The model's modes and gradients are restored, and so are the global random states, which start from ``seed``.

        Raises:
            ForeignAttackError: if the result is not within this threat model, or the model was changed.
        """
        with _left_as_it_was(model, self.name), _seeded(seed, x.device), torch.enable_grad():
            result = self.function(model, x.detach().clone(), y.clone())
        return self._checked(result, x)

    def _checked(self, result: object, x: Tensor) -> Tensor:
        threat_model = self.threat_model
        if not isinstance(result, Tensor) or result.shape != x.shape or not result.is_floating_point():
            got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ForeignAttackError(
                f"foreign attack {self.name} ({self.source}) has to return attacked images, a floating-point tensor "
                f"{tuple(x.shape)}, got {got}"
            )
        x_adv = result.detach().to(x)
        pixels = x_adv.flatten(1)
        self._refuse("hold pixels that are not finite", ~pixels.isfinite().all(1), None, "repair it")
        outside = torch.maximum(-pixels, pixels - 1).amax(1)
        hint = "clip them; pixels are not normalized, the model does that by itself"
        self._refuse("have pixels outside [0, 1]", outside > ALLOWANCE, outside, hint)
        change = (x_adv - x).flatten(1)
        linf = threat_model.norm == "linf"
        distance = change.abs().amax(1) if linf else change.norm(dim=1)
        radius = float(threat_model.epsilon)
        self._refuse(
            f"lie outside the {threat_model.norm} ball of radius {radius:.6g} ({255 * radius:.4g}/255)",
            distance > radius + ALLOWANCE * max(1.0, radius),
            distance,
            "give it the radius of the evaluation, or evaluate with --norm and --epsilon of the attack",
        )
        return threat_model.project(x_adv, x)

    def _refuse(self, what: str, wrong: Tensor, distance: Tensor | None, hint: str) -> None:
        count = int(wrong.sum())
        if count:
            largest = "" if distance is None else f", the largest distance is {float(distance.max()):.6g}"
            raise ForeignAttackError(
                f"foreign attack {self.name} ({self.source}): {count} of {len(wrong)} attacked images {what}"
                f"{largest}; {hint}"
            )


def load_foreign_attack(place: str) -> ForeignAttack:
    """The function at ``package.module:function`` or ``file.py:function``, of this machine; nothing is downloaded.

    Its name is the last part of the module and its own, such as ``my_attack.attack``. ValueError names what is missing
    or cannot be imported.
    """
    flag = f"--foreign_attack {place}"
    origin, colon, name = place.rpartition(":")
    if "://" in place or not colon or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ValueError(
            f"{flag}: expected package.module:function of an installed package, or file.py:function of a file here"
        )
    module = _module_of(origin, flag)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ValueError(
                f"{flag}: {origin} has no {name}; it has {', '.join(sorted(known)[:12]) or 'no function'}"
            )
        found = getattr(found, part)
    return foreign_attack(f"{module.__name__.rpartition('.')[2]}.{name}", found, source=place)


def load_foreign_attacks(places: Sequence[str]) -> list[ForeignAttack]:
    """The functions at these places, see `load_foreign_attack`; ValueError also if two have one name."""
    found = [load_foreign_attack(place) for place in places]
    names = [attack.name for attack in found]
    for attack in found:
        if names.count(attack.name) > 1:
            raise ValueError(f"--foreign_attack {' '.join(places)}: two are called {attack.name}; rename a function")
    return found


def foreign_attack(name: str, function: AttackFunction, *, source: str | None = None) -> ForeignAttack:
    """A function as an attack; its file's checksum is part of the settings, so that a change of it is noticed."""
    try:
        file = inspect.getsourcefile(function)
    except TypeError:  # an instance, or a function without source
        file = None
    digest = sha256(Path(file)) if file and Path(file).is_file() else None
    where = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__name__)}"
    return ForeignAttack(name=name, function=function, source=source or where, sha256=digest)


def _module_of(origin: str, flag: str) -> Any:  # noqa: ANN401 (a module)
    try:
        if not origin.endswith(".py"):
            return importlib.import_module(origin)
        path = Path(origin).expanduser()
        if not path.is_file():
            raise ValueError(f"{flag}: there is no file {origin}")
        name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # noqa: S101 (the name ends in .py)
        assert spec.loader is not None  # noqa: S101
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickles of the file look for their module there; a module of that name keeps its place.
        sys.modules.setdefault(name, module)
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, TypeError) as error:
        raise ValueError(f"{flag}: {origin} cannot be imported ({type(error).__name__}: {error})") from error
    return module


@contextmanager
def _left_as_it_was(model: nn.Module, name: str) -> Iterator[None]:
    """Evaluation mode without gradients of parameters inside; modes, gradients and buffers as they were afterwards.

    A change of weights or buffers is a ForeignAttackError; buffers are restored.
    """
    versions = {key: parameter._version for key, parameter in model.named_parameters()}
    # By value: BatchNorm updates its statistics without a new version.
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with attack_mode(model):
            for parameter, _ in gradients:
                parameter.grad = None  # an attack's backward() would add to it in place
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        changed = [key for key, parameter in model.named_parameters() if parameter._version != versions[key]]
        for key, buffer in model.named_buffers():
            if not torch.equal(buffer, buffers[key]):
                changed.append(key)
                buffer.copy_(buffers[key])
    if changed:
        raise ForeignAttackError(
            f"foreign attack {name} changed the model ({', '.join(changed[:3])}): an attack may change images alone, "
            "and must leave the model in evaluation mode"
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random states that depend on the seed alone inside, and are as they were afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with isolated_rng(), torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
