"""What the trainer knows of a training method.

For each batch a method answers two questions: which rows go through the one training forward (the inner
maximization, `Objective.outer_batch`), and what each of them costs (the outer minimization, `Objective.losses` and
`Objective.weigh`). Everything else (dividing by the sums over all processes and accumulation steps, backward, the
update) is the trainer's.

A method that treats classes differently also keeps *class state*: named tensors, the same on every process, that
only the hooks below change. They come in the order of a run:

    initial_state                      once
    before_epoch                       every epoch, then, where `wants_held_out`,
      held_out_sums -> after_held_out  on held-out images
    class_attack                       every batch: radius and step of each class
    preview -> before_update           every update, where `wants_preview`: sums over the rows about to be trained on
    class_weight                       every update: weight of each class in each term of the loss
    observe -> after_update            every update: sums over the rows trained on

Sums are added over all batches and processes by the trainer before a hook sees them. A class-wise method can lend
its radii (`Combinable.class_margin`) or its weights (`Combinable.class_weighting`) to another method.

A method is one frozen dataclass in one file; its fields are its command-line options, its `name` the value of
``--method``. Importing the file is all that is needed: `available` finds every subclass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel, pgd
from ham_hf.methods.losses import BASE_LOSSES, BaseLoss

State: TypeAlias = dict[str, Tensor]
"""Class state of one method: named tensors on the device of the model, changed in place by its hooks."""
States: TypeAlias = Mapping[str, State]
"""The state of every part of a method (`Objective.parts`), by the name of the part."""


@dataclass(frozen=True, eq=False, kw_only=True)
class InnerAttack:
    """The attack of the inner maximization.

    Attributes:
        threat_model: norm and radius.
        num_steps: K.
        step_size: length of a step in pixel units; a number or one per example (N,).
    """

    threat_model: ThreatModel
    num_steps: int
    step_size: float | Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class OuterBatch:
    """The part of a batch that the outer minimization trains on: E examples in R rows.

    Attributes:
        x: (R, C, H, W) rows for the single training forward, in blocks of E: the adversarial images first, then
            whatever else the loss needs of the same examples. R may be 0.
        y: (E,) labels of the examples.
        weight: weight >= 0 of each example: (E,) in every term of the loss, or (T, E) in each of them.
        divided_by: (E,) what an example adds to the divisor of every term; None = its weight.
        with_adversarial: (A,) positions of the examples that have an adversarial image in ``x``, in its order; None =
            all have one.
        hard: (N,) bool over the whole batch for methods that mine, else None.
        wrong_at_start: (N,) bool over the whole batch, misclassified where the attack started, for methods that treat
            such examples differently, else None.
        early_logits: (N, num_classes) of the whole batch in mid-attack for methods that mine, else None.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    divided_by: Tensor | None = None
    with_adversarial: Tensor | None = None
    hard: Tensor | None = None
    wrong_at_start: Tensor | None = None
    early_logits: Tensor | None = None

    @property
    def adversarial_y(self) -> Tensor:
        """Labels (A,) of the first block of rows, the adversarial images."""
        return self.y if self.with_adversarial is None else self.y[self.with_adversarial]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all training methods: PGD adversarial training unless a method says otherwise."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    """One line for ``--help`` and the model card."""
    gives_margin: ClassVar[bool] = False
    """Whether `class_attack` can be lent to other methods."""
    gives_weights: ClassVar[bool] = False
    """Whether `class_weight` can be lent to other methods."""
    weighs_losses: ClassVar[tuple[str, ...]] = tuple(BASE_LOSSES)
    """Names of the losses that `class_weight` makes sense for."""
    uses_held_out: ClassVar[bool] = False
    """Whether the method cannot do without held-out images."""
    uses_class_counts: ClassVar[bool] = False
    """Whether `initial_state` looks at how many training images a class has; streams may not know it (NaN)."""
    wants_preview: ClassVar[bool] = False
    divides_by_class_weight: ClassVar[bool] = False
    """Whether a term is divided by the sum of its weights, class weights included; else by that of the examples'."""
    gates_averaging: ClassVar[bool] = False
    """Whether fairness-gated weight averaging belongs to the published method."""

    def check(self, *, num_steps: int) -> None:
        """Check the options against the attack before anything expensive starts.

        Args:
            num_steps: K, the number of attack steps of the run.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """

    def check_parts(self) -> None:
        """Check the options of the methods this one borrows from, once each is known to be valid by itself.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """

    @classmethod
    def as_rule(cls, **options: Any) -> Objective:  # noqa: ANN401 (fields of any type)
        """The method with these options, to lend its radii or weights to another one."""
        return cls(**options)

    @property
    def warmup_epochs(self) -> int:
        """Number of first epochs in which the method is still its plain base loss; 0 if there are none."""
        return 0

    @property
    def depends_on_split(self) -> bool:
        """Whether an update depends on how its examples are split into processes and accumulation steps."""
        return False

    @property
    def tells_wrong_at_start(self) -> bool:
        """Whether outer batches of epochs that mine say what is misclassified where the attack starts."""
        return False

    @property
    def draws_classes(self) -> bool:
        """Whether the method has a sampler (`class_probabilities`)."""
        return type(self).class_probabilities is not Objective.class_probabilities

    @property
    def loss(self) -> BaseLoss:
        """The loss that the method is built on."""
        return BaseLoss()

    @property
    def num_terms(self) -> int:
        """T, the number of terms of the loss."""
        return self.loss.num_terms

    @property
    def margin(self) -> Objective:
        """The part whose `class_attack` is used."""
        return self

    @property
    def weighting(self) -> Objective:
        """The part whose `class_weight` is used."""
        return self

    @property
    def parts(self) -> tuple[Objective, ...]:
        """This method and the methods whose radii or weights it borrows, each once."""
        return tuple({part.name: part for part in (self, self.margin, self.weighting)}.values())

    def start_epochs(self, awp_start_epoch: int | None = None) -> dict[str, int]:
        """The 0-based epoch in which each part begins to differ from plain adversarial training, by its name.

        Args:
            awp_start_epoch: first epoch of the weight perturbation; None = there is none.
        """
        starts = {part.name: part.warmup_epochs for part in self.parts}
        return starts if awp_start_epoch is None else starts | {"awp": awp_start_epoch}

    def start_words(self, awp_start_epoch: int | None = None) -> dict[str, str]:
        """The same for people, who count from 1, with the flag, which counts from 0: "epoch 13 (--... 12)"."""
        words = {}
        for name, first in self.start_epochs(awp_start_epoch).items():
            part = next((part for part in self.parts if part.name == name), None)
            option = "awp_start_epoch"
            if part is not None:
                option = next((field.name for field in fields(part) if field.name.endswith("_start_epoch")), "")
            flag = f"--{option} {first}" if part in (self, None) else f"--class_rule_args {option}={first}"
            words[name] = f"epoch {first + 1} ({flag})" if option else f"epoch {first + 1}"
        return words

    # --- the inner maximization

    def outer_batch(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        attack: InnerAttack,
        epoch: int,
        states: States,
        generator: torch.Generator | None = None,
    ) -> OuterBatch:
        """Run the inner maximization and choose the rows to train on.

        Args:
            model: the unwrapped pixel model; left as it was found (invariant 2).
            x: (N, C, H, W) pixels in [0, 1].
            y: (N,) labels.
            attack: threat model, steps and step size.
            epoch: 0-based epoch.
            states: class state of all parts.
            generator: source of all randomness, on the device of ``x``.
        """
        attack = self.attack_on(y, attack, epoch=epoch, states=states)
        x_adv = pgd(
            model,
            x,
            y,
            threat_model=attack.threat_model,
            num_steps=attack.num_steps,
            step_size=attack.step_size,
            start=self.loss.start(x, attack.threat_model, generator),
            loss_fn=self.loss.attack_loss(model, x),
        )
        return OuterBatch(x=self.loss.rows(x_adv, x), y=y, weight=torch.ones_like(x[:, 0, 0, 0]))

    def outer_batches(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Tensor, Tensor, torch.Generator]],
        *,
        attack: InnerAttack,
        epoch: int,
        states: States,
    ) -> list[OuterBatch]:
        """`outer_batch` of each accumulation step of an update: images, labels and source of randomness.

        Returns:
            As many outer batches; a method may move rows from one to another, but not ``hard`` and ``early_logits``.
        """
        return [
            self.outer_batch(model, x, y, attack=attack, epoch=epoch, states=states, generator=generator)
            for x, y, generator in batches
        ]

    def attack_on(self, y: Tensor, attack: InnerAttack, *, epoch: int, states: States) -> InnerAttack:
        """The attack with the radius and step of each example's class, where the method has its own."""
        of_class = self.margin.class_attack(states[self.margin.name], attack, epoch=epoch)
        if of_class is None:
            return attack
        radius, step_size = of_class
        return InnerAttack(
            threat_model=replace(attack.threat_model, epsilon=radius[y]),
            num_steps=attack.num_steps,
            step_size=step_size[y],
        )

    # --- the outer minimization

    def losses(self, logits: Tensor, batch: OuterBatch) -> Tensor:
        """Value of each term for each example (T, E) from the logits (R, num_classes) of ``batch.x``, unweighted."""
        return self.loss.terms(logits, batch.y)

    def weigh(self, batch: OuterBatch, *, epoch: int, states: States) -> tuple[Tensor, Tensor]:
        """Weight of each term and example (T, E), and this batch's part of each term's divisor (T,).

        The loss of an update is, summed over its terms, sum(weight * term) / sum(divisor), both sums over all
        processes and accumulation steps (invariant 3).
        """
        of_class = self.weighting.class_weight(states[self.weighting.name], self.loss, epoch=epoch)
        weight = batch.weight.expand(self.num_terms, -1)
        divided_by = weight if batch.divided_by is None else batch.divided_by.expand_as(weight)
        if of_class is not None:
            of_example = of_class.to(weight.dtype)[:, batch.y]
            weight = weight * of_example
            if self.weighting.divides_by_class_weight:
                divided_by = divided_by * of_example
        # Numbers, not a tensor of them: that would have to be copied to the device, and be waited for.
        scaled = [row * scale for row, scale in zip(weight, self.loss.scales, strict=True)]
        return torch.stack(scaled), divided_by.sum(1)

    # --- class state; see the module for the order

    def initial_state(self, class_counts: Tensor) -> State:
        """Class state at the beginning of a run.

        Args:
            class_counts: (num_classes,) number of training images of each class, in the dtype and on the device
                that the state should have too.
        """
        return {}

    def before_epoch(self, state: State, *, epoch: int) -> None:
        """Turn what was observed in the epoch before into what holds for this one."""

    def wants_held_out(self, epoch: int) -> bool:
        """Whether `held_out_sums` are to be taken before this epoch."""
        return False

    def held_out_sums(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        attack: InnerAttack,
        loss: BaseLoss,
        num_classes: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Sums over a batch of held-out images (S, num_classes), with the model in evaluation mode."""
        raise NotImplementedError(f"{self.name} takes no sums over held-out images")

    def after_held_out(self, state: State, sums: Tensor, *, epoch: int) -> None:
        """Take in the sums (S, num_classes) over all held-out images."""

    def class_attack(self, state: State, attack: InnerAttack, *, epoch: int) -> tuple[Tensor, Tensor] | None:
        """Radius and step size of each class, (num_classes,) each, in pixel units; None leaves the attack alone."""
        return None

    def preview(self, logits: Tensor, y: Tensor, num_classes: int) -> Tensor:
        """Sums over rows about to be trained on, from their adversarial training logits (E, num_classes)."""
        raise NotImplementedError(f"{self.name} takes no sums before an update")

    def before_update(self, state: State, sums: Tensor) -> None:
        """Take in the sums of `preview` over all rows of the update."""

    def class_weight(self, state: State, loss: BaseLoss, *, epoch: int) -> Tensor | None:
        """Weight of each class in each term of ``loss`` (T, num_classes), 1 = plain; None leaves all at 1."""
        return None

    def observe(self, logits: Tensor, y: Tensor, *, epoch: int) -> Tensor | None:
        """Sums over examples, of one shape whatever their number (also 0); None observes nothing.

        Args:
            logits: (N, num_classes) of adversarial images: of the training forward; from methods that mine, of the
                whole batch at the mining step, as the hard rows alone would say nothing of a class.
            y: (N,) labels.
            epoch: 0-based epoch.
        """
        return None

    def after_update(self, state: State, sums: Tensor) -> None:
        """Take in the sums of `observe` over all examples of the update."""

    def class_probabilities(self, state: State) -> Tensor | None:
        """Probability of each class (num_classes,) in the next epoch's draws; None takes every example once."""
        return None


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums over many examples, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def class_sums(values: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Sum of the values (N, ...) of each class (num_classes, ...), in float64 where the device has it."""
    sums = torch.zeros(num_classes, *values.shape[1:], dtype=statistics_dtype(values.device), device=values.device)
    return sums.index_add_(0, y, values.detach().to(sums.dtype))


def available() -> dict[str, type[Objective]]:
    """Every imported training method by name, in alphabetical order."""
    found: dict[str, type[Objective]] = {}
    pending = Objective.__subclasses__()
    while pending:
        kind = pending.pop(0)
        if kind.name:
            found[kind.name] = kind
        pending.extend(kind.__subclasses__())
    return dict(sorted(found.items()))
