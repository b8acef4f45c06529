"""Rows that kept their predictions are set against the baseline image by image; older ones are shown and say so."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch

from ham_hf.comparison.leaderboard import leaderboard_html
from ham_hf.comparison.pairs import compare_paired, mcnemar
from ham_hf.comparison.report import comparison_markdown
from ham_hf.comparison.table import compare
from tests.support.comparison_reports import METRICS, judged_run
from tests.support.documents import changed


def bold(comparison, label, attack="verdict"):
    return [metric for metric in METRICS if comparison.is_bold(label, attack, metric)]


def test_one_seed_is_enough_where_the_same_images_tell():
    """Every image that the baseline is right on is right for the other row too, and eight more."""
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [24, 52, 61, 71])
    comparison = compare([base, own], baseline="base")
    assert list(comparison.attacks) == ["verdict", "clean", "pgd-20"]
    paired = comparison.pairs.found["own"]["verdict"]
    assert paired.seeds == (0,)
    assert (paired.differences.only_reference, paired.differences.only_other) == ((0,), (8,))
    assert paired.differences.p_values == (mcnemar(0, 8),)
    assert paired.differences.average.mean == pytest.approx(8 / 400)
    assert paired.differences.worst_class.mean == pytest.approx(0.04)
    assert bold(comparison, "own") == bold(comparison, "own", "pgd-20") == list(METRICS)
    assert bold(comparison, "base") == bold(comparison, "own", "clean") == []


def test_the_same_numbers_on_other_images_say_less():
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [24, 52, 61, 71], swap=20)
    assert bold(compare([base, own], baseline="base"), "own") == []


def test_local_folders_of_one_name_with_other_images_are_not_paired():
    runs = [judged_run(label, [20, 50, 60, 70]) for label in ("base", "own")]
    for place, images in enumerate(("1a", "2b")):
        data = {"name": f"/{images}/data", "hub_id": None, "trained_on": {"image_fingerprint": images}}
        runs[place] = changed(runs[place], dataset=data)
    assert "trained on other images" in compare(runs, baseline="base").pairs.unpaired["own, PGD-20"]


def test_a_worst_class_that_moved_is_no_gain():
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [60, 15, 60, 70])
    comparison = compare([base, own], baseline="base")
    assert comparison.pairs.found["own"]["verdict"].differences.worst_class.is_sure()
    assert "worst_class" not in bold(comparison, "own")


def test_several_seeds_have_to_agree():
    base = [judged_run("base", [20, 50, 60, 70], seed=seed) for seed in range(3)]
    own = [judged_run("own", [40, 55, 65, 75], seed=seed) for seed in range(2)]
    agreed = compare([*base, *own, judged_run("own", [30, 55, 65, 75], seed=2)], baseline="base")
    assert bold(agreed, "own") == list(METRICS)
    worse = judged_run("own", [19, 55, 65, 75], seed=2)
    disagreed = compare([*base, *own, worse], baseline="base")
    assert "worst_class" not in bold(disagreed, "own")
    assert "average" in bold(disagreed, "own")
    differences = disagreed.pairs.found["own"]["verdict"].differences.worst_class
    assert differences.per_seed == pytest.approx((0.2, 0.2, -0.01))
    assert differences.low > 0


def test_rows_on_other_images_are_not_paired():
    base, other = judged_run("base", [20, 50, 60, 70]), judged_run("own", [40, 50, 60, 70])
    moved = dataclasses.replace(other.verdicts, positions=other.verdicts.positions + 1)
    comparison = compare([base, dataclasses.replace(other, verdicts=moved)], baseline="base")
    assert comparison.pairs.found["own"] == {}
    assert "different images" in comparison.pairs.unpaired["own, Verdict"]


def test_a_row_judged_on_half_of_the_images_leaves_the_pairs_of_the_others():
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [24, 52, 61, 71])
    alone = compare([base, own], baseline="base")
    half = judged_run("half", [26, 50, 50, 50], seen=50)
    comparison = compare([base, own, half], baseline="base")
    assert comparison.pairs.found["own"] == alone.pairs.found["own"]
    assert comparison.rows[1] == alone.rows[1]
    assert bold(comparison, "own") == bold(alone, "own") != []
    assert [comparison.unlike(name) for name in comparison.attacks] == [["half"], [], ["half"]]
    assert comparison.pairs.unpaired == {}
    assert {name: found.differences.num_examples for name, found in comparison.pairs.found["half"].items()} == {
        "verdict": 200, "clean": 400, "pgd-20": 200,
    }  # fmt: skip
    paired = comparison.pairs.found["half"]["verdict"].differences
    assert (paired.only_reference, paired.only_other) == ((0,), (6,))
    assert comparison.rows[2].attacks["verdict"].rho is None
    assert comparison.rows[2].attacks["clean"].rho is not None
    text = comparison_markdown(comparison, command="x")
    assert text.count("**Not the same evaluation as base:** half. Dataset,") == 2
    assert re.findall(r"^\| (own|half) \| 0 \| (\d+) \|", text, re.MULTILINE) == [("own", "400"), ("half", "200")]
    assert "Verdict, 200 images: average +3.0" in leaderboard_html(comparison)


def test_a_worst_class_is_no_gain_where_the_shared_images_say_otherwise():
    """On all images the worst class of the baseline has 20 %, on those that both saw 40 %."""
    base = judged_run("base", [20, 50, 60, 70])
    for last, better in ((25, True), (18, False)):
        comparison = compare([base, judged_run("own", [40, 50, 50, last], seen=50)], baseline="base")
        assert comparison.pairs.found["own"]["verdict"].differences.worst_class.is_sure()
        assert ("worst_class" in bold(comparison, "own")) == better


def test_seeds_judged_on_different_parts_are_paired_on_what_all_saw():
    base = [judged_run("base", [20, 40, 40, 40], seed=seed) for seed in range(2)]
    own = [judged_run("own", [30, 40, 45, 48], seed=seed, seen=seen) for seed, seen in enumerate((50, 100))]
    found = compare([*base, *own], baseline="base").pairs.found["own"]["verdict"]
    assert (found.seeds, found.differences.num_examples) == ((0, 1), 200)
    assert found.differences.only_other == (23, 23)


def test_a_row_attacked_otherwise_is_named_and_stays_apart():
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [24, 52, 61, 71])
    gentle = judged_run("gentle", [60, 60, 70, 80], epsilon=4 / 255)
    comparison = compare([base, own, gentle], baseline="base")
    assert bold(comparison, "own") != []
    assert list(comparison.pairs.found["gentle"]) == ["clean"]
    assert comparison.pairs.unpaired == {
        "gentle, Verdict": "evaluated with other settings than the baseline (PGD-20)",
        "gentle, PGD-20": "evaluated with other settings than the baseline (PGD-20)",
    }
    long = dataclasses.replace(gentle, label="gentle (num_steps 10, step_size 2/255, class_weighting hard_fraction)")
    text = comparison_markdown(compare([base, long], baseline="base"), command="x")
    assert re.findall(r"^- gentle.*, (PGD-20|Verdict): evaluated", text, re.MULTILINE) == ["Verdict", "PGD-20"]
    assert [row.attacks["verdict"].rho is None for row in comparison.rows] == [False, False, True]
    assert "PGD-20: not paired: evaluated with other settings than the baseline (PGD-20)" in leaderboard_html(
        comparison
    )


def test_mcnemar_is_the_two_sided_binomial_test():
    for one, other in itertools.product(range(7), repeat=2):
        num, few = one + other, min(one, other)
        tail = sum(math.comb(num, index) for index in range(few + 1)) / 2**num
        assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail), abs=1e-15)
    assert mcnemar(0, 0) == 1.0
    assert 0 < mcnemar(4000, 5000) < 1e-20
    with pytest.raises(ValueError, match="counts >= 0"):
        mcnemar(-1, 2)


def drawn(num, chances, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % len(chances)
    return labels, torch.rand(num, generator=generator) < torch.tensor(chances)[labels]


def test_paired_differences_against_loops():
    labels, reference = drawn(400, [0.2, 0.5, 0.6, 0.9], 0)
    _, other = drawn(400, [0.5, 0.5, 0.5, 0.9], 1)
    found = compare_paired(reference[None], other[None], labels, num_classes=4)
    of_classes = [labels == index for index in range(4)]
    ours, theirs = ([float(flags[rows].double().mean()) for rows in of_classes] for flags in (other, reference))
    order = sorted(range(4), key=lambda index: theirs[index])
    assert found.num_examples == 400
    assert found.average.mean == pytest.approx(float(other.double().mean() - reference.double().mean()))
    assert found.worst_class.mean == pytest.approx(ours[order[0]] - theirs[order[0]])
    pair = [ours[index] - theirs[index] for index in order[:2]]
    assert found.worst_30_percent.mean == pytest.approx(sum(pair) / 2)
    assert found.only_reference == (int((reference & ~other).sum()),)
    assert found.only_other == (int((~reference & other).sum()),)
    assert found.p_values == (mcnemar(found.only_reference[0], found.only_other[0]),)
    # The interval of a difference of paired flags, by the formula of its variance.
    gain = (other.double() - reference.double())[labels == order[0]].numpy()
    half = 1.96 * gain.std() / math.sqrt(len(gain))
    assert found.worst_class.high - found.worst_class.low == pytest.approx(2 * half, rel=0.1)
    assert found.worst_class.is_sure()
    assert found.worst_class.low > 0


def test_one_model_against_itself_differs_in_nothing():
    labels, flags = drawn(200, [0.2, 0.5, 0.7], 0)
    found = compare_paired(flags[None], flags[None], labels, num_classes=4)
    for difference in (found.average, found.worst_class, found.worst_30_percent):
        assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
        assert not difference.is_sure()
    assert found.p_values == (1.0,)


def test_several_pairs_are_averaged_and_have_to_agree():
    labels, _ = drawn(3000, [0.3, 0.6], 0)
    pairs = [(drawn(3000, [0.3, 0.6], 2 * seed)[1], drawn(3000, [0.4, 0.6], 2 * seed + 1)[1]) for seed in range(3)]
    reference, other = (torch.stack(flags) for flags in zip(*pairs, strict=True))
    found = compare_paired(reference, other, labels, num_classes=2)
    both = zip(reference, other, strict=True)
    singles = [compare_paired(one[None], two[None], labels, num_classes=2) for one, two in both]
    assert found.worst_class.per_seed == tuple(one.worst_class.mean for one in singles)
    assert found.worst_class.mean == pytest.approx(np.mean(found.worst_class.per_seed))
    assert found.p_values == tuple(one.p_values[0] for one in singles)
    assert found.worst_class.is_sure()
    # One pair that says the opposite is enough.
    mixed = torch.stack([*reference[:2], other[2]]), torch.stack([*other[:2], reference[2]])
    mixed = compare_paired(*mixed, labels, num_classes=2)
    assert not mixed.worst_class.is_sure()


def test_flags_of_different_images_are_refused():
    flags = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected flags"):
        compare_paired(flags, flags[:, :2], torch.zeros(3, dtype=torch.long), num_classes=2)
    with pytest.raises(ValueError, match="expected flags"):
        compare_paired(flags[0], flags[0], torch.zeros(3, dtype=torch.long), num_classes=2)
