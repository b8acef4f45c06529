"""One number per class added to the logits, so that robust accuracy is spread more evenly: how many, and at what cost.

Post-hoc logit adjustment (Menon et al., ICLR 2021) is the source; finding the numbers under attack, for robust
fairness, is ours. ``a_c`` is the share of held-out images of class c that are right under CW-10 *on the shifted
model*; an image is attacked until it is misclassified. With fairness F in [0, 1] the goal of class c is
mean(a) + (1 - F) (a_c(0) - mean a(0)), a_c(0) being its share before any shift: F 0 leaves the model as it is, bit for
bit, and F 1 asks for equality. Ten rounds of ``shift_c += 2 (goal_c - a_c) 0.9^round``, centered, find the shifts for
the first F. Each further F takes the last four of them from the shifts of the nearest F that was searched, and the
search on all images from the mean of its halves: about as close to the goal. Longer steps would lead away from it
where logits are small and turn many images.

Of few images the found shift is partly noise, so that of a class with n_c < 300 images is multiplied by
n_c / (n_c + 10) x 310 / 300 (our choice: 10 is what empirical Bayes gives for class accuracies around 0.4 that spread
by 0.15; 0.69 at 20 images, 0.94 at 100, 1 from 300 on). A class without images keeps 0.

What a setting of the dial gives is measured on images that its shifts were not found on: shifts from one half of the
images, counts from the other, and back. The random start of an image is the same in every round and for every F, and
so is the first round, which is computed once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ham_hf.attacks import Attack, ThreatModel, check_pixel_range, evaluation_mode, margin_loss, predicted
from ham_hf.data import BatchRequest, Images, PixelBatch
from ham_hf.data.splits import stratified_split
from ham_hf.evaluation.batch_sharing import Outcome, SharedBatches, StopWatch, WorkingSize, Workplace
from ham_hf.evaluation.config import CalibrationConfig
from ham_hf.evaluation.robustness import memory_layout, predict
from ham_hf.intervals import simultaneous_intervals
from ham_hf.metrics import count_per_class, mean_of_worst, summarize_counts
from ham_hf.mining import FirstLogits
from ham_hf.precision import attack_passes
from ham_hf.seeding import Stream, make_generator

logger = logging.getLogger(__name__)

NUM_ROUNDS, STEP, DECAY = 10, 2.0, 0.9
NUM_WARM_ROUNDS = 4
"""Rounds of a search that starts from shifts found before."""
MIN_IMAGES = 20
"""Fewest held-out images of a class that has any."""
TRUSTED_IMAGES, SHRINKAGE = 300, 10
FRONTIER = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Values of F at which average and worst classes are always measured."""
NUM_BISECTIONS = 3
"""Values of F tried between two of the frontier's for ``max_average_drop``: steps of 0.2 become ones of 0.025."""


@dataclass(frozen=True, kw_only=True)
class SearchAttack(Attack):
    """The attack of the search, CW: PGD on the margin, one random start.

    Attributes:
        precision: "float32", or "bf16" or "fp16" for the attack's passes; what is counted as right is always float32.
    """

    step_size: float
    precision: str = "float32"

    def while_right(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) where the attack from ``start`` ends, and the number of steps (N,) that each one took.

        The last step of an image is the one whose gradient finds it misclassified: what is broken needs no more.
        """
        step, left = replace(self, num_steps=1), torch.arange(len(y), device=y.device)
        x_adv, steps = start.clone(), torch.zeros_like(y)
        for _ in range(self.num_steps):
            seen = FirstLogits(margin_loss)
            x_adv[left] = step(model, x[left], y[left], start=x_adv[left], loss_fn=seen)
            steps[left] += 1
            left = left[predicted(seen.logits) == y[left]]
            if not len(left):
                break
        return x_adv, steps

    def settings(self, seed: int) -> dict[str, object]:
        """Settings as a report lists them; JSON types only."""
        return {**self.as_json(), "loss": "margin", "precision": self.precision, "restarts": 1, "seed": seed}


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """Accuracies of one setting of the dial under the attack of the search, cross-fitted, in shares.

    Attributes:
        fairness: F.
        average: share of all held-out images that are right, with its 95 % Wilson interval.
        worst_class: smallest class accuracy. Its interval is from the smallest lower to the smallest upper end of the
            classes' simultaneous Wilson intervals (each at 1 - 0.05 / C), which all hold at once with 95 %.
        worst_30_percent: mean of the worst 30 % of the classes; its interval is that of the same ends, which bounds
            it as it grows with each class.
        correct: right images of each class.
    """

    fairness: float
    average: float
    average_low: float
    average_high: float
    worst_class: float
    worst_class_low: float
    worst_class_high: float
    worst_30_percent: float
    worst_30_percent_low: float
    worst_30_percent_high: float
    correct: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Class shifts, and what the dial of fairness gives.

    Attributes:
        fairness: F that the shifts are for.
        shifts: number added to the logit of each class of the dataset, float32 values, after shrinking.
        factors: what the found shift of each class was multiplied by, as few images say less; 0 without images.
        counts: held-out images of each class.
        frontier: points by growing F; the one of ``fairness`` is among them.
        passes: passes of an image that were counted in the search (forward 1, gradient of the input 2).
        attack: settings of the attack; JSON values only.
    """

    fairness: float
    shifts: tuple[float, ...]
    factors: tuple[float, ...]
    counts: tuple[int, ...]
    frontier: tuple[FrontierPoint, ...]
    passes: int
    attack: Mapping[str, object]


def check_held_out(labels: Tensor, class_names: Sequence[str], *, how: str) -> None:
    """Refuse to calibrate on too few images of a class; a class without any is fine.

    Raises:
        ValueError: naming the classes, how many images each one lacks, and ``how`` to get more.
    """
    counts = count_per_class(labels, len(class_names)).tolist()
    short = [(name, count) for name, count in zip(class_names, counts, strict=True) if 0 < count < MIN_IMAGES]
    if not any(counts):
        raise ValueError(f"there is no held-out image to calibrate on; {how}")
    if short:
        listed = ", ".join(f"{name!r} has {count} and lacks {MIN_IMAGES - count}" for name, count in short[:5])
        more = f", and {len(short) - 5} more classes" if len(short) > 5 else ""
        raise ValueError(
            f"calibration needs {MIN_IMAGES} held-out images of every class that has any: {listed}{more}; {how}"
        )


def shrinkage(counts: Tensor) -> Tensor:
    """Factors (C,) float64 for shifts that were found on so many images (C,) of each class."""
    counts = counts.double()
    factor = counts / (counts + SHRINKAGE) * (TRUSTED_IMAGES + SHRINKAGE) / TRUSTED_IMAGES
    return factor.clamp(max=1.0)


def calibrate(
    model: nn.Module,
    images: Images,
    config: CalibrationConfig,
    place: Workplace,
    *,
    threat_model: ThreatModel,
    num_classes: int,
) -> Calibration:
    """Find the shifts that a fairness asks for, and measure the frontier.

    For ``max_average_drop`` the frontier is measured first; between the last F before the average has dropped by more,
    going up, and the next one, three more are tried by bisection; the largest that keeps to it is taken, F 0 at least.

    Args:
        model: the unwrapped pixel model, on its device; not changed.
        images: held out of training; at least 20 of each class that has any (`check_held_out`).
        config: the fairness or the drop that is asked for, and the attack of the search.
        place: where it runs; its seed is that of the random starts and of the two halves. The shifts do not depend on
            the number of processes, and a repeated call after a kill finds the same ones sooner.
        threat_model: of the attack, whose steps are a quarter of its radius.
        num_classes: number of logits.
    """
    attack = SearchAttack(
        threat_model=threat_model,
        step_size=float(threat_model.epsilon) / 4,
        num_steps=config.calibration_num_steps,
        precision=config.calibration_precision,
    )
    meter = _Meter(model, images, attack, num_classes, place)
    fairness, drop = config.fairness, config.max_average_drop
    values = {*FRONTIER, *(() if fairness is None else (fairness,))}
    most = _most_measurements(sum(value > 0 for value in values) + (0 if drop is None else NUM_BISECTIONS))
    _show_forecast(meter, most)
    hidden = not (place.show_progress and place.accelerator.is_local_main_process)
    with evaluation_mode(model), tqdm(total=most, desc="calibrating", unit="half round", disable=hidden) as bar:
        meter.bar = bar
        points = {value: _cross_fitted(meter, value) for value in sorted(values)}
        if fairness is None:
            assert drop is not None  # noqa: S101 (a calibration is asked for)
            fairness = _largest_within(meter, points, drop)
        shifts = _found_shifts(meter, fairness, (0, 1))
    return Calibration(
        fairness=fairness,
        shifts=tuple(shifts.tolist()),
        factors=tuple(shrinkage(meter.counts((0, 1))).tolist()),
        counts=tuple(meter.counts((0, 1)).tolist()),
        frontier=tuple(points[value] for value in sorted(points)),
        passes=meter.passes,
        attack=attack.settings(place.seed),
    )


class ShiftedLogits(nn.Module):
    """A classifier with a number added to each of its ``num_classes`` logits; the model is not copied."""

    shift: Tensor

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters(), torch.empty(0)).device
        self.register_buffer("shift", torch.zeros(num_classes, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shifted logits (N, num_classes)."""
        logits: Tensor = self.model(x)
        return logits + self.shift


class _Meter:
    """Counts right images per class of one half of the images, or both, for given shifts.

    Batches and their random starts belong to a half, whether it is measured alone or with the other. ``found`` keeps
    the shifts of each half by F, not shrunk.
    """

    def __init__(
        self, model: nn.Module, images: Images, attack: SearchAttack, num_classes: int, place: Workplace
    ) -> None:
        self.model, self.images, self.attack = ShiftedLogits(model, num_classes), images, attack
        self.attacked = attack_passes(self.model, attack.precision)
        self.layout = memory_layout(model)
        self.num_classes, self.place, self.key = num_classes, place, place.key(model, images)
        self.halves = stratified_split(images.labels, 0.5, place.seed)
        self.size = WorkingSize(place.batch_size)
        self.known: dict[tuple[int, tuple[float, ...]], Tensor] = {}
        self.passes = 0
        self.found: tuple[dict[float, Tensor], dict[float, Tensor]] = ({}, {})
        self.bar: tqdm | None = None  # type: ignore[type-arg]  # tqdm.auto's takes none

    def counts(self, halves: Sequence[int]) -> Tensor:
        """Images (C,) int64 of each class in these halves."""
        rows = torch.cat([self.halves[half] for half in halves])
        return count_per_class(self.images.labels[rows], self.num_classes)

    def correct(self, shifts: Tensor, halves: Sequence[int]) -> Tensor:
        """Right images (C,) int64 of each class in these halves, attacked with ``shifts`` (C,) float32."""
        total = torch.zeros(self.num_classes, dtype=torch.long)
        for half in halves:
            key = (half, tuple(shifts.tolist()))
            if key not in self.known:
                self.known[key] = self._measure(*key)
                if self.bar is not None:
                    self.bar.update()
            total += self.known[key]
        return total

    def seconds_per_round(self) -> float:
        """Time of a half, from that of its first batch; what a process does not share is its own."""
        batches = torch.split(self.halves[0], self.place.batch_size)
        watch = StopWatch(self.place.accelerator.device)
        for batch in self.images.batches([BatchRequest(batches[0], None)], device=self.place.accelerator.device):
            self._predictions(0, batch)
        batches_of_one_process = -(-len(batches) // self.place.accelerator.num_processes)
        return watch.lap() * min(float(batches_of_one_process), len(self.halves[0]) / len(batches[0]))

    def _measure(self, half: int, shifts: tuple[float, ...]) -> Tensor:
        rows, labels = self.halves[half], self.images.labels
        self.model.shift.copy_(torch.tensor(shifts))
        shared = SharedBatches(
            "calibrating",
            torch.split(rows, self.place.batch_size),
            shape=(2, len(labels)),
            place=self.place,
            key=self.key,
            settings={"attack": self.attack.settings(self.place.seed), "half": half, "shifts": shifts},
        )
        offset = half * len(torch.split(self.halves[0], self.place.batch_size))
        for number, batch in shared.of(self.images):
            found = self._predictions(offset + number, batch)
            shared.add(number, Outcome(found, torch.full(found.shape, torch.nan), torch.zeros(2)))
        attacked, passes = shared.gather().predictions[:, rows]
        self.passes += int(passes.sum())
        return count_per_class(labels[rows], self.num_classes, attacked == labels[rows])

    def _predictions(self, number: int, batch: PixelBatch) -> Tensor:
        """Predictions under attack, and passes, (2, n), of the images of the batch with this number."""
        check_pixel_range(batch.x)
        # Of all rows, whichever are right as they are: that changes with the shifts.
        generator = make_generator(batch.x.device, self.place.seed, Stream.CALIBRATION, number)
        start = self.attack.threat_model.random_start(batch.x, generator)

        def strike(rows: slice) -> Tensor:
            x, y = batch.x[rows].contiguous(memory_format=self.layout), batch.y[rows]
            attacked = predict(self.model, x)
            passes, right = torch.ones_like(attacked), (attacked == y).nonzero().squeeze(1)
            if len(right):
                first = start[rows][right].contiguous(memory_format=self.layout)
                x_adv, steps = self.attack.while_right(self.attacked, x[right], y[right], first)
                attacked[right], passes[right] = predict(self.model, x_adv), 2 + 2 * steps
            return torch.stack([attacked, passes], dim=1)

        return self.size.split(strike, len(batch.y)).T


def _most_measurements(num_values: int) -> int:
    """Measurements of half the images, at most, for so many F above 0 (>= 1): one search from zero, the others warm.

    The counts before any shift are shared; each half's shifts are counted on the other; the last search takes both.
    """
    return 2 + 2 * NUM_ROUNDS + 2 * (NUM_WARM_ROUNDS + 1) * (num_values - 1) + 2 * NUM_WARM_ROUNDS


def _found_shifts(meter: _Meter, fairness: float, halves: Sequence[int]) -> Tensor:
    """Shifts (C,) float32 found on one half, or on both once each was searched with this F; shrunk."""
    counts = meter.counts(halves)
    if fairness == 0:
        return torch.zeros(len(counts))
    present = counts > 0

    def shares(shifts: Tensor) -> Tensor:
        found = meter.correct(shifts.float(), halves)
        return torch.where(present, found / counts.clamp(min=1), 0.0).double()

    first = shares(torch.zeros(len(counts)))
    spread = first - first[present].mean()
    shifts, num_rounds = _start(meter, fairness, halves)
    for number in range(NUM_ROUNDS - num_rounds, NUM_ROUNDS):
        accuracy = shares(shifts)
        goal = accuracy[present].mean() + (1 - fairness) * spread
        shifts = shifts + torch.where(present, STEP * (goal - accuracy) * DECAY**number, 0.0)
        shifts -= torch.where(present, shifts[present].mean(), 0.0)
    if len(halves) == 1:
        meter.found[halves[0]][fairness] = shifts
    return (shifts * shrinkage(counts)).float()


def _start(meter: _Meter, fairness: float, halves: Sequence[int]) -> tuple[Tensor, int]:
    """Shifts (C,) float64 to start a search from, and its rounds."""
    if len(halves) == 2:
        return (meter.found[0][fairness] + meter.found[1][fairness]) / 2, NUM_WARM_ROUNDS
    found = meter.found[halves[0]]
    if not found:
        return torch.zeros(meter.num_classes, dtype=torch.float64), NUM_ROUNDS
    return found[min(found, key=lambda value: (abs(value - fairness), value))], NUM_WARM_ROUNDS


def _cross_fitted(meter: _Meter, fairness: float) -> FrontierPoint:
    """Counts of each half under the shifts of the other."""
    one, other = (meter.correct(_found_shifts(meter, fairness, [1 - half]), [half]) for half in (0, 1))
    return frontier_point(fairness, (one + other).tolist(), meter.counts((0, 1)).tolist())


def frontier_point(fairness: float, correct: Sequence[int], counts: Sequence[int]) -> FrontierPoint:
    """Average and worst classes with their intervals from the right and all images of each class."""
    summary = summarize_counts(correct, counts)
    lows, highs = zip(*simultaneous_intervals(correct, counts), strict=True)
    return FrontierPoint(
        fairness=fairness,
        average=summary.average,
        average_low=summary.average_low,
        average_high=summary.average_high,
        worst_class=summary.worst_class,
        worst_class_low=min(lows),
        worst_class_high=min(highs),
        worst_30_percent=summary.worst_30_percent,
        worst_30_percent_low=mean_of_worst(lows, 30),
        worst_30_percent_high=mean_of_worst(highs, 30),
        correct=tuple(correct),
    )


def _largest_within(meter: _Meter, points: dict[float, FrontierPoint], max_average_drop: float) -> float:
    """The largest F whose cross-fitted average has not dropped by more; what is tried is added to ``points``."""

    def holds(value: float) -> bool:
        if value not in points:
            points[value] = _cross_fitted(meter, value)
        return points[0.0].average - points[value].average <= max_average_drop + 1e-9  # shares round

    below = 0.0
    for above in FRONTIER[1:]:
        if not holds(above):
            break
        below = above
    else:
        return below
    for _ in range(NUM_BISECTIONS):
        middle = round((below + above) / 2, 6)
        below, above = (middle, above) if holds(middle) else (below, middle)
    return below


def _show_forecast(meter: _Meter, rounds: int) -> None:
    """Say what the work will take before it begins; every process times a batch of its own."""
    num_images, attack = len(meter.images), meter.attack
    with evaluation_mode(meter.model):
        seconds = rounds * meter.seconds_per_round()
    logger.info(
        "calibrating on %d images: at most %d measurements of half of them, %.3g passes of an image, about %.0f s on "
        "%d process(es); if it is killed, the same command resumes",
        num_images,
        rounds,
        float(rounds * -(-num_images // 2) * (2 + 2 * attack.num_steps)),
        seconds,
        meter.place.accelerator.num_processes,
    )
