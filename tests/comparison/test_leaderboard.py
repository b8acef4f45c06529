"""leaderboard.html: who is ranked with whom, its numbers, and that a name in it is text."""

from __future__ import annotations

import dataclasses
import html
import re
import statistics
from pathlib import Path

import pytest

from ham_hf.comparison.existing import label_runs
from ham_hf.comparison.leaderboard import leaderboard_html, write_leaderboard
from ham_hf.comparison.pairs import FinishedRun
from ham_hf.comparison.table import compare
from tests.support.documents import changed
from tests.support.leaderboard_runs import leaderboard_comparison, ranked_run

HOSTILE = "</script><script>window.hacked = 1</script>"


def rankings(text: str, attack: str) -> list[list[str]]:
    """Labels of each ranking of one evaluation, in the order in which they stand."""
    (part,) = re.findall(rf'<section class="attack" data-attack="{attack}".*?</section>', text, flags=re.DOTALL)
    tables = re.findall(r"<table.*?</table>", part, flags=re.DOTALL)
    return [list(map(html.unescape, re.findall(r'class="entry" data-label="([^"]*)"', table))) for table in tables]


def plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def other_steps(run: FinishedRun) -> FinishedRun:
    results = dict(run.report.results)
    for name, found in results.items():
        results[name] = dataclasses.replace(found, settings={**found.settings, "num_steps": 100})
    return dataclasses.replace(run, report=dataclasses.replace(run.report, results=results))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: changed(run, threat_model={"epsilon": 0.1}), "Threat model: epsilon 0.1; above: epsilon 8/255"),
        (lambda run: changed(run, threat_model={"norm": "l2"}), "Threat model: l2; above: linf"),
        (other_steps, "PGD-20: num_steps 100; above: num_steps 20"),
        (lambda run: changed(run, dataset={"num_test": 199}), "Test images: 199; above: 200"),
        (lambda run: changed(run, dataset={"name": "svhn"}), "Dataset: svhn; above: digits"),
    ],
)
def test_what_was_not_attacked_alike_is_never_in_one_ranking(change, words: str) -> None:
    runs = [ranked_run("a", [5] * 10), ranked_run("b", [6] * 10), ranked_run("c", [19] * 10)]
    runs[2] = change(runs[2])
    text = leaderboard_html(compare(runs))
    assert rankings(text, "pgd-20") == [["b", "a"], ["c"]]
    assert text.count("Not attacked alike") >= 1
    assert words in plain(text)
    assert rankings(leaderboard_html(compare(runs[:2])), "pgd-20") == [["b", "a"]]
    assert "Not attacked alike" not in leaderboard_html(compare(runs[:2]))


def test_seeds_of_a_row_that_were_attacked_otherwise_stand_apart() -> None:
    runs = [ranked_run("a", [5] * 10, seed=seed) for seed in range(2)]
    runs.append(ranked_run("a", [15] * 10, seed=2, epsilon=4 / 255))
    text = leaderboard_html(compare(runs))
    assert rankings(text, "pgd-20") == [["a"], ["a"]]
    assert "20.0" in plain(text)  # (5 - 1) / 20, without the third seed


def test_numbers_are_means_over_seeds_with_the_means_of_their_intervals() -> None:
    runs = [ranked_run("a", [5 + seed, *[10 + seed] * 9], seed=seed) for seed in range(3)]
    text = plain(leaderboard_html(compare(runs)))
    found = [run.report.results["pgd-20"] for run in runs]
    averages = [(one.summary.average, (one.summary.average_low, one.summary.average_high)) for one in found]
    worst = [(one.summary.worst_class, one.intervals.worst_class) for one in found]
    third = [(one.summary.worst_30_percent, one.intervals.worst_30_percent) for one in found]
    for of_seeds in (averages, worst, third):
        numbers, intervals = zip(*of_seeds, strict=True)
        low, high = (100 * statistics.fmean(side) for side in zip(*intervals, strict=True))
        assert f"{100 * statistics.fmean(numbers):.1f} {low:.1f}–{high:.1f}" in text


def test_names_are_data(tmp_path: Path) -> None:
    path = write_leaderboard(leaderboard_comparison(HOSTILE), tmp_path, command='x "</script>"')
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 1
    assert HOSTILE in html.unescape(text)
    assert not re.search(r"(src|href)=.?(https?:|//)(?!//huggingface\.co/)", text)
    assert len(text.encode()) < 200_000


def test_runs_that_are_evaluations_alone_are_rows() -> None:
    report = dataclasses.replace(ranked_run("x", [5] * 10).report, training=None, config={"seed": 0})
    (run,) = label_runs([FinishedRun(label="", seed=0, report=report, source="you/net")])
    assert run.label == "resnet18_cifar"
    assert "evaluated, not trained here" in leaderboard_html(compare([run]))


def test_a_ranking_says_how_many_models_it_has_and_whether_seconds_compare() -> None:
    runs = [ranked_run("a", [5] * 10), ranked_run("b", [6] * 10)]
    assert "1 model #" in plain(leaderboard_html(compare(runs[:1])))
    assert "2 models #" in plain(leaderboard_html(compare(runs)))
    runs[1] = changed(runs[1], environment={"device": "H100"})
    assert "2 models; seconds are of different hardware #" in plain(leaderboard_html(compare(runs)))
