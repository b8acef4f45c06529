"""The settings of an evaluation and of a calibration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ham_hf.settings import SettingsGroup, setting

if TYPE_CHECKING:
    from ham_hf.attacks import Attack, ThreatModel


def pixel_unit_problems(norm: str | None, **lengths: float | None) -> Iterator[str]:
    """Lengths in a linf ball, by the name of their setting, that look as if they were meant on the 0..255 scale."""
    for name, length in lengths.items():
        if norm == "linf" and length is not None and length > 1:
            yield (
                f"--{name} {length:g}: {name} is in pixel units of [0, 1], at most 1 unless --norm is l2; "
                f"did you mean {length:g}/255?"
            )


@dataclass(frozen=True, kw_only=True)
class ThreatConfig(SettingsGroup):
    """The threat model of an evaluation; by default the one that the model was trained for."""

    norm: Literal["linf", "l2"] | None = setting(
        None, "norm that bounds the perturbation; none = as the model was trained, else linf"
    )
    epsilon: float | None = setting(
        None, "radius of the perturbation in pixel units; none = as the model was trained, else 8/255", above=0
    )

    def contradictions(self) -> Iterator[str]:
        """Epsilon on the 0..255 scale; where the model says the norm, `ham_hf.fitting.threat_model_of` looks again."""
        yield from pixel_unit_problems(self.norm, epsilon=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(SettingsGroup):
    """The attacks on the test split, with the norm and epsilon of the threat model."""

    per_device_eval_batch_size: int = setting(
        256, "images per process in evaluation; fewer at once if memory runs out", at_least=1
    )
    eval_num_steps: int = setting(20, "steps of the PGD and CW attacks", at_least=1)
    eval_step_size: float | None = setting(None, "length of their steps in pixel units; none = epsilon / 4", above=0)
    autoattack: bool = setting(False, "also run standard AutoAttack (needs the extra ham-hf[autoattack])")
    autoattack_examples: int | None = setting(
        None, "run AutoAttack on this many test images, stratified; none = all", at_least=1
    )

    def attack(self, threat_model: ThreatModel) -> Attack:
        """PGD, whose steps are those of CW too, in this ball of one radius."""
        from ham_hf.attacks import Attack

        length = float(threat_model.epsilon) / 4 if self.eval_step_size is None else self.eval_step_size
        return Attack(threat_model=threat_model, num_steps=self.eval_num_steps, step_size=length)

    def contradictions(self) -> Iterator[str]:
        """A setting of AutoAttack without AutoAttack."""
        if not self.autoattack:
            yield from self.idle(["autoattack_examples"], "--autoattack")


@dataclass(frozen=True, kw_only=True)
class MoreEvaluationConfig(SettingsGroup):
    """Further measurements in an evaluation of a finished model: other attacks, corruptions, groups."""

    foreign_attack: tuple[str, ...] = setting(
        (),
        "also run functions attack(model, x, y) of this machine: package.module:function or file.py:function",
        items="PLACE:FUNCTION",
    )
    corruptions: tuple[str, ...] = setting(
        (), "also measure accuracy on images with these corruptions; all = the benchmark's", items="NAME"
    )
    severities: tuple[int, ...] = setting((1, 2, 3, 4, 5), "severities of the corruptions, 1 to 5")
    group_column: str | None = setting(
        None, "also report accuracy per group of this column of the test split, and the worst group"
    )

    def contradictions(self) -> Iterator[str]:
        """Unknown or repeated severities, or severities without corruptions."""
        given = f"--severities {' '.join(map(str, self.severities))}"
        if not self.severities or not set(self.severities) <= {1, 2, 3, 4, 5}:
            yield f"{given}: expected some of 1 2 3 4 5"
        elif len(set(self.severities)) < len(self.severities):
            yield f"{given}: expected each severity once"
        elif not self.corruptions and self.severities != type(self).severities:
            yield f"{given} has no effect without --corruptions"


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(SettingsGroup):
    """Class shifts found on held-out images after training, which spread robust accuracy more evenly over classes."""

    fairness: float | None = setting(
        None, "how evenly: 0 = as trained, 1 = all classes alike; none = no calibration", at_least=0, at_most=1
    )
    max_average_drop: float | None = setting(
        None,
        "instead of --fairness: the largest one whose held-out average drops by at most this share",
        at_least=0,
        at_most=1,
    )
    calibration_num_steps: int = setting(10, "steps of the CW attack of the search, of epsilon / 4 each", at_least=1)
    calibration_precision: Literal["float32", "bf16", "fp16"] = setting(
        "float32", "precision of that attack's passes; predictions are counted in float32"
    )

    @property
    def is_asked_for(self) -> bool:
        """Whether there is anything to calibrate."""
        return self.fairness is not None or self.max_average_drop is not None

    def contradictions(self) -> Iterator[str]:
        """Two goals at once, and settings of a search without one."""
        if self.fairness is not None and self.max_average_drop is not None:
            yield (
                f"--fairness {self.fairness:g} and --max_average_drop {self.max_average_drop:g} exclude each other; "
                "give one of them"
            )
        if not self.is_asked_for:
            yield from self.idle(
                ["calibration_num_steps", "calibration_precision"], "--fairness or --max_average_drop"
            )
