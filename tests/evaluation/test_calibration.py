"""The search for class shifts: finds a known one, leaves a model as it is at F 0, repeats itself, and is honest."""

from __future__ import annotations

import json
import logging
import math
import os

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel, margin_loss, pgd
from ham_hf.data.splits import stratified_split
from ham_hf.evaluation import Workplace, calibration
from ham_hf.evaluation.calibration import FRONTIER, SearchAttack, calibrate, check_held_out, frontier_point, shrinkage
from ham_hf.evaluation.config import CalibrationConfig
from ham_hf.intervals import worst_class_interval
from ham_hf.training.train_step import PassCounter
from tests.conftest import ROOT
from tests.support.nets import TensorImages
from tests.support.recipe_runs import LAUNCH, PROCESSES, finish

BIAS = torch.tensor([0.9, -0.2, -0.7])
NUM_CLASSES = 3
THREAT = ThreatModel("linf", 0.05)


class ChannelMeans(nn.Module):
    """Logits are the means of the channels, ten times, plus a bias: fair without it, as the classes are alike."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((2, 3)) + self.bias


def channel_images(per_class: int, num_classes: int = NUM_CLASSES, seed: int = 0) -> TensorImages:
    """In images of class c, channel c is a little brighter than the others; the same margins for every class."""
    generator = torch.Generator().manual_seed(seed)
    level = 0.5 + 0.05 * torch.randn(per_class, 3, 1, 1, generator=generator)
    parts = []
    for label in range(num_classes):
        # The same values, turned from class to class, so that the classes differ in nothing but their number.
        turned = level.clone().roll(label, 1)
        turned[:, label] += 0.15
        parts.append(turned.expand(-1, -1, 2, 2).clamp(0, 1))
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    return TensorImages(torch.cat(parts), labels)


def place_of(batch_size=512, folder=None) -> Workplace:
    return Workplace(accelerator=Accelerator(cpu=True), batch_size=batch_size, seed=0, output_dir=folder)


def run(images, fairness=None, *, model=None, batch_size=512, folder=None, threat_model=THREAT, **settings):
    config = CalibrationConfig(fairness=fairness, **settings)
    place = place_of(batch_size, folder)
    return calibrate(model or ChannelMeans(BIAS), images, config, place, threat_model=threat_model, num_classes=3)


def point_of(found, fairness=None):
    """The frontier's point at F, by default the one of the shifts."""
    wanted = found.fairness if fairness is None else fairness
    return next(point for point in found.frontier if point.fairness == wanted)


@pytest.fixture
def quick(monkeypatch):
    """The asked F and F 0 only, where the frontier is not what is tested."""
    monkeypatch.setattr(calibration, "FRONTIER", (0.0,))


class Oracle:
    """Counts the images of a linear model by hand: the adversary moves every margin by as much."""

    def __init__(self, images: TensorImages, *, scale: float) -> None:
        self.labels, self.scale = images.labels, scale
        self.logits = scale * images.x.double().mean((2, 3)) + BIAS.double() * scale / 10

    def shares(self, shift: Tensor, rows: Tensor) -> Tensor:
        logits, labels = (self.logits + shift.float().double())[rows], self.labels[rows]
        rest = logits.scatter(1, labels[:, None], -math.inf)
        # Own channel down by epsilon, the other one up by epsilon.
        right = logits.gather(1, labels[:, None])[:, 0] - rest.amax(1) > 2 * self.scale * 0.05
        return torch.stack([right[labels == c].double().mean() for c in range(3)])

    def lacking(self, shift: Tensor, fairness: float, rows: Tensor) -> Tensor:
        """What the shares lack."""
        first, now = self.shares(torch.zeros(3), rows), self.shares(shift, rows)
        return now.mean() + (1 - fairness) * (first - first.mean()) - now

    def miss(self, shift: Tensor, fairness: float) -> float:
        return self.lacking(shift, fairness, torch.arange(len(self.labels))).abs().max().item()

    def search(self, shift: Tensor, fairness: float, rows: Tensor, rounds: range) -> Tensor:
        for number in rounds:
            shift = shift + 2 * self.lacking(shift, fairness, rows) * 0.9**number
            shift = shift - shift.mean()
        return shift

    def shifts(self, fairness: float, halves: tuple[Tensor, Tensor]) -> Tensor:
        """Ten rounds for the first F of a half; the last four of ten for others, from the nearest, and for both."""
        last, ends = range(6, 10), []
        for rows in halves:
            found = {0.2: self.search(torch.zeros(3, dtype=torch.float64), 0.2, rows, range(10))}
            for value in sorted({*FRONTIER, fairness} - {0.0, 0.2}):
                nearest = min(found, key=lambda one: (abs(one - value), one))
                found[value] = self.search(found[nearest], value, rows, last)
            ends.append(found[fairness])
        return self.search((ends[0] + ends[1]) / 2, fairness, torch.arange(len(self.labels)), last)


class TestSearch:
    @pytest.mark.parametrize(("norm", "precision"), [("linf", "float32"), ("l2", "bf16")])
    def test_finds_the_shift_that_undoes_a_known_bias(self, quick, norm, precision):
        threat_model = ThreatModel(norm, {"linf": 0.05, "l2": 0.1}[norm])
        found = run(channel_images(400), 1.0, calibration_precision=precision, threat_model=threat_model)
        torch.testing.assert_close(torch.tensor(found.shifts), -BIAS, atol=0.05, rtol=0)
        assert found.factors == (1.0,) * 3
        before, after = point_of(found, 0.0), point_of(found)
        assert before.worst_class < 0.2 < 0.5 < after.worst_class
        assert max(after.correct) - min(after.correct) < 20

    @pytest.mark.parametrize(("scale", "fairness"), [(10.0, 0.5), (6.0, 0.5), (5.0, 1.0)])
    def test_follows_the_formula_and_reaches_the_goal_where_logits_are_small(self, scale, fairness):
        """The smaller they are, the more images a round turns: too long steps from a good start would lead away."""
        model = ChannelMeans(BIAS * scale / 10)
        model.scale.data.fill_(scale)
        images = channel_images(300)
        oracle, found = Oracle(images, scale=scale), run(images, fairness, model=model)
        shifts, zero = torch.tensor(found.shifts).double(), torch.zeros(3, dtype=torch.float64)
        every = torch.arange(900)
        expected = oracle.shifts(fairness, stratified_split(images.labels, 0.5, seed=0))
        torch.testing.assert_close(shifts, expected, atol=0.02, rtol=0)
        assert found.counts == (300,) * 3
        plain = oracle.search(zero, fairness, every, range(10))
        assert oracle.miss(shifts, fairness) < oracle.miss(plain, fairness) + 0.02
        assert oracle.shares(shifts, every).min() > oracle.shares(zero, every).min() + 0.3

    def test_nothing_is_shifted_at_zero(self):
        found = run(channel_images(40), 0.0)
        assert found.shifts == (0.0,) * 3
        assert [point.fairness for point in found.frontier] == list(FRONTIER)

    def test_a_class_without_images_keeps_zero(self, quick):
        images = channel_images(100, num_classes=2)
        found = run(images, 1.0)
        assert found.shifts[2] == 0
        assert found.counts == (100, 100, 0)
        assert found.shifts[1] > 0 > found.shifts[0]
        assert point_of(found).correct[2] == 0
        assert point_of(found).worst_class > 0

    def test_model_and_mode_are_left_alone(self, quick):
        model = nn.Sequential(ChannelMeans(BIAS), nn.BatchNorm1d(3)).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        run(channel_images(40), 0.5, model=model)
        assert model.training
        assert model[1].training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_shifts_are_shrunk_where_images_are_few(self, quick):
        few = run(channel_images(20), 1.0)
        assert few.factors == pytest.approx([20 / 30 * 310 / 300] * 3)
        counts = torch.tensor([0, 20, 100, 300, 5000])
        assert shrinkage(counts).tolist() == pytest.approx([0, 0.68889, 0.93939, 1, 1], abs=1e-5)


class TestAttack:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_each_image_takes_steps_until_one_finds_it_misclassified(self, norm):
        images = channel_images(30)
        model, x, y = ChannelMeans(BIAS).double(), images.x.double(), images.labels
        x, y = x[right := model(x).argmax(1) == y], y[right]
        attack = SearchAttack(threat_model=ThreatModel(norm, 0.12), step_size=0.03, num_steps=6)
        start = attack.threat_model.random_start(x, torch.Generator().manual_seed(0))
        found, steps = attack.while_right(model, x, y, start)
        for row in range(len(y)):
            one, taken, x_adv = slice(row, row + 1), 0, start[row : row + 1]
            while taken < 6:
                broken = model(x_adv).argmax(1) != y[one]
                x_adv = pgd(
                    model,
                    x[one],
                    y[one],
                    threat_model=attack.threat_model,
                    num_steps=1,
                    step_size=0.03,
                    start=x_adv,
                    loss_fn=margin_loss,
                )
                taken += 1
                if broken:
                    break
            assert steps[row] == taken
            torch.testing.assert_close(found[one], x_adv)
        assert len(steps.unique()) > 2


class TestFrontier:
    def test_is_cross_fitted_with_intervals_at_six_values(self):
        found = run(channel_images(100), 0.5)
        assert [point.fairness for point in found.frontier] == sorted({*FRONTIER, 0.5})
        worst = [point.worst_class for point in found.frontier]
        assert worst == sorted(worst)
        assert worst[-1] > worst[0]
        for point in found.frontier:
            assert point.average == sum(point.correct) / 300
            assert point.average_low < point.average < point.average_high
            assert point.worst_class_low < point.worst_class < point.worst_class_high
            assert point.worst_30_percent_low <= point.worst_30_percent <= point.worst_30_percent_high

    def test_counts_come_from_images_that_the_shifts_were_not_found_on(self, quick, monkeypatch):
        """The images that a half's shifts are found on and those they are counted on never overlap."""
        searched, counted = [], []
        correct = calibration._Meter.correct
        found_shifts = calibration._found_shifts

        def find(meter, fairness, halves):
            searched.append(list(halves))
            return found_shifts(meter, fairness, halves)

        def count(meter, shifts, halves):
            counted.append(list(halves))
            return correct(meter, shifts, halves)

        monkeypatch.setattr(calibration, "_found_shifts", find)
        monkeypatch.setattr(calibration._Meter, "correct", count)
        images = channel_images(21)
        attack = SearchAttack(threat_model=THREAT, step_size=0.0125, num_steps=10)
        meter = calibration._Meter(ChannelMeans(BIAS), images, attack, 3, place_of())
        calibration._cross_fitted(meter, 0.5)
        assert searched == [[1], [0]]
        # Before any shift and in ten rounds on one half, then once on the other; and back.
        assert counted == [[1]] * 11 + [[0]] * 12 + [[1]]
        first, second = (set(half.tolist()) for half in meter.halves)
        assert not first & second
        assert first | second == set(range(63))

    def test_interval_of_the_worst_class_is_simultaneous(self):
        correct, counts = [30, 50, 0], [100, 100, 0]
        point = frontier_point(0.0, correct, counts)
        assert (point.worst_class_low, point.worst_class_high) == worst_class_interval(correct, counts)
        assert point.worst_class == 0.3

    def test_largest_fairness_within_a_drop(self, monkeypatch):
        """Class 0 is harder than the others, so serving it costs the average."""
        monkeypatch.setattr(calibration, "FRONTIER", (0.0, 0.5, 1.0))
        images, model = channel_images(150), ChannelMeans(torch.zeros(3))
        images.x[:150, 0] -= 0.09
        free = run(images, 1.0, model=model)
        full = point_of(free, 0.0).average - point_of(free, 1.0).average
        assert full > 0.02
        within = run(images, max_average_drop=full / 3, model=model)
        assert 0 < within.fairness < 1
        assert point_of(within, 0.0).average - point_of(within).average <= full / 3
        assert len(within.frontier) == 3 + 3
        # 24 of 450 images are lost at 0.5, whatever the difference of two shares rounds to.
        assert run(images, max_average_drop=24 / 450, model=model).fairness >= 0.5
        assert run(images, max_average_drop=1.0, model=model).fairness == 1.0


class TestRepetition:
    def test_killed_and_repeated(self, quick, tmp_path, monkeypatch):
        """The second call finds the same shifts, and attacks only what the first had not."""
        images, model = channel_images(20), ChannelMeans(BIAS)
        expected = run(images, 0.5, model=model, batch_size=20)
        strikes, strike = [], calibration._Meter._predictions

        def counted(*given):
            if len(strikes) == 20:
                raise KeyboardInterrupt
            strikes.append(1)
            return strike(*given)

        monkeypatch.setattr(calibration._Meter, "_predictions", counted)
        with pytest.raises(KeyboardInterrupt):
            run(images, 0.5, model=model, batch_size=20, folder=tmp_path)
        before = len(list(tmp_path.rglob("*.json")))
        assert before == 19  # one batch was timed for the forecast
        strikes.clear()
        monkeypatch.setattr(calibration._Meter, "_predictions", lambda *given: strikes.append(1) or strike(*given))
        again = run(images, 0.5, model=model, batch_size=20, folder=tmp_path)
        assert again == expected
        assert len(strikes) - 1 == len(list(tmp_path.rglob("*.json"))) - before

    def test_batch_size_and_memory_do_not_matter_much(self, quick):
        images = channel_images(100)
        one, other = run(images, 1.0), run(images, 1.0, batch_size=50)
        torch.testing.assert_close(torch.tensor(one.shifts), torch.tensor(other.shifts), atol=0.1, rtol=0)

    # 2 before any shift; 20 for the first F above 0, 10 for each of the others, 8 for the search on all; a drop has
    # one F less and three more to try.
    @pytest.mark.parametrize(("goal", "most"), [({"fairness": 0.5}, 80), ({"max_average_drop": 0.0}, 100)])
    def test_the_work_is_forecast_and_counted(self, goal, most, caplog, monkeypatch):
        monkeypatch.setattr(calibration._Meter, "seconds_per_round", lambda meter: 0.0)  # no batch is timed
        model, counter = ChannelMeans(BIAS), PassCounter()
        counter.watch(model)
        with caplog.at_level(logging.INFO, logger="ham_hf"):
            found = run(channel_images(20), **goal, model=model, batch_size=16)
        (line,) = [record.getMessage() for record in caplog.records if "calibrating" in record.getMessage()]
        assert f"at most {most} measurements of half of them" in line
        assert f"{most * 30 * 22:.3g} passes" in line
        assert found.passes == counter.take()
        assert 70 * 30 < found.passes < most * 30 * 22


TWO_PROCESSES = """
import json, sys
import torch
from accelerate import Accelerator
from tests.evaluation import test_calibration as tests
from ham_hf.evaluation import calibration

calibration.FRONTIER = (0.0,)
found = tests.run(tests.channel_images(30), 1.0, batch_size=13)
with open(f"{sys.argv[1]}-{Accelerator(cpu=True).process_index}", "w") as file:
    json.dump([found.shifts, [point.correct for point in found.frontier], found.passes], file)
"""


@pytest.mark.slow
def test_two_processes_find_the_same_shifts(quick, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    command = [*LAUNCH, *PROCESSES[2], str(script), str(tmp_path / "found")]
    finish(command, {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"})
    alone = run(channel_images(30), 1.0, batch_size=13)
    for process in (0, 1):
        shifts, correct, passes = json.loads((tmp_path / f"found-{process}").read_text())
        assert shifts == list(alone.shifts)
        assert correct == [list(point.correct) for point in alone.frontier]
        assert passes == alone.passes


class TestRefusals:
    def test_too_few_images_of_a_class(self):
        labels = torch.tensor([0] * 20 + [1] * 7)
        with pytest.raises(ValueError, match=r"20 held-out images .*'b' has 7 and lacks 13; raise --validation"):
            check_held_out(labels, ["a", "b", "c"], how="raise --validation_fraction")
        check_held_out(labels[:20], ["a", "b", "c"], how="")

    def test_no_image(self):
        with pytest.raises(ValueError, match="no held-out image"):
            check_held_out(torch.tensor([], dtype=torch.long), ["a"], how="hold some out")
