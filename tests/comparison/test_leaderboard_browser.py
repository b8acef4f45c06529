"""leaderboard.html in a real browser: order by click and key, links that show the same, sizes, hostile names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ham_hf.comparison.leaderboard import write_leaderboard
from tests.support.browser import NEEDS_BROWSER, Browser, assert_quiet, browser, soonest_paint
from tests.support.leaderboard_runs import leaderboard_comparison

pytestmark = NEEDS_BROWSER
SHOWN = "return [...document.querySelectorAll('.attack:not([hidden]) .board:first-of-type .entry')].map(e => "
LABELS = f"{SHOWN}e.dataset.label)"
BY_WORST = ["ham", "resnet of a stranger", "</script><script>window.hacked = 1</script>", "pgd_at"]


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_leaderboard(leaderboard_comparison(), tmp_path_factory.mktemp("page"))


def test_columns_order_the_rows_of_each_ranking_alone(window: Browser, page: Path) -> None:
    window.open(page)
    assert window.run(LABELS) == BY_WORST
    window.click(".attack:not([hidden]) .sort[data-sort=average]")
    by_average = window.run(LABELS)
    values = window.run(f"{SHOWN}Number(e.dataset.average))")
    assert values == sorted(values, reverse=True)
    window.click(".attack:not([hidden]) .sort[data-sort=average]")
    assert window.run(LABELS) == by_average[::-1]
    assert window.run("return document.querySelector('.attack:not([hidden]) [aria-sort]').ariaSort") == "ascending"
    # Cost: the lowest first, and what was not measured last, either way.
    for _ in range(2):
        window.click(".attack:not([hidden]) .sort[data-sort=seconds]")
        assert window.run(LABELS)[-1] == "resnet of a stranger"
    groups = "return [...document.querySelectorAll('.attack:not([hidden]) .board')].map(e => e.tBodies[0].rows.length)"
    assert window.run(groups) == [4, 1]
    assert_quiet(window)


def test_keys_alone_order_and_open(window: Browser, page: Path) -> None:
    window.open(page)
    window.run("document.querySelector('.attack:not([hidden]) .sort[data-sort=price]').focus()")
    window.press("Enter")
    assert window.run(LABELS)[:2] == ["ham", "pgd_at"]
    assert window.run("return document.activeElement.dataset.sort") == "price"
    window.run("document.querySelector('.attack:not([hidden]) .model[tabindex=\"0\"]').focus()")
    window.press("ArrowDown", "Enter")
    assert window.run("return document.querySelector('.detail article').dataset.label") == "pgd_at"
    assert window.run("return document.activeElement.closest('.entry').dataset.label") == "pgd_at"
    assert window.run("return document.activeElement.ariaExpanded") == "true"
    assert window.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    window.press("End")
    assert window.run("return document.activeElement.closest('.entry').dataset.label") == "gentle"
    assert window.run("return document.querySelectorAll('.attack:not([hidden]) .model[tabindex=\"0\"]').length") == 1
    window.press("Home", "ArrowDown", "Enter")
    assert window.run("return document.querySelectorAll('.detail').length") == 0
    assert_quiet(window)


def test_a_link_shows_attack_order_and_row(window: Browser, page: Path) -> None:
    window.open(page)
    choose = "const s = document.getElementById('attack'); s.value = 'cw-20'; s.dispatchEvent(new Event('change'))"
    window.run(choose)
    window.click(".attack:not([hidden]) .sort[data-sort=worst_30_percent]")
    hostile = ".attack:not([hidden]) .entry[data-label^='</script>'] .model"
    window.click(hostile)
    link, shown = window.run("return location.href"), window.run(LABELS)
    assert "resnet of a stranger" not in shown
    for address in (link, f"{page.resolve().as_uri()}#attack=nothing&sort=&row=%00"):
        window.command("POST", "/url", {"url": "about:blank"})
        window.command("POST", "/url", {"url": address})
        if address == link:
            assert window.run(LABELS) == shown
            assert window.run("return document.getElementById('attack').value") == "cw-20"
            assert window.run("return document.querySelector('.detail article').dataset.label") == BY_WORST[2]
    assert window.run(LABELS) == BY_WORST
    assert window.run("return document.querySelector('.detail')") is None
    assert window.run("return window.hacked") is None
    assert_quiet(window)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_everything_fits(window: Browser, page: Path, width: int) -> None:
    window.open(page, width=width)
    for place in range(4):
        window.run("document.querySelectorAll('.attack:not([hidden]) .model')[arguments[0]].click()", place)
        assert window.run("return document.querySelectorAll('.detail .worst li').length") == 10
        assert_quiet(window)
    assert window.run("return window.hacked") is None
    assert window.run("return document.querySelectorAll('script').length") == 1


def test_paints_soon(window: Browser, page: Path) -> None:
    assert soonest_paint(window, page, limit=200) < 200
