"""report.html in a real browser: clicks, keys, sizes, hostile names, and that nothing leaves the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ham_hf.evaluation.calibration import frontier_point
from ham_hf.reporting.page import PageRun, page_html
from tests.support.browser import NEEDS_BROWSER, Browser, assert_quiet, browser, soonest_paint
from tests.support.documents import calibration
from tests.support.example_report import make_report, one_example

pytestmark = NEEDS_BROWSER
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "{{ 7 * 7 }} {% raw %}",
    "]]> --> <!--",
    "a\u202eb\u2028c",
    "'; window.hacked = 3; '",
    "javascript:window.hacked=4",
    "x" * 400,
    "\ud800 surrogate",
    "",
)
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def written(path: Path, names: Sequence[str], *, images: bool = False) -> Path:
    """A page of a calibrated model with curves, and with three images of class 0."""
    count = len(names)
    shown = calibration(
        shifts=(0.0,) * count,
        factors=(1.0,) * count,
        counts=(20,) * count,
        frontier=tuple(frontier_point(f, [int(10 + 5 * f)] * count, [20] * count) for f in (0.0, 0.5, 1.0)),
    )
    report = make_report(class_names=names, num_test=20 * count, treatment={"hard_per_class": 2})
    report = dataclasses.replace(report, calibration=shown)
    examples = one_example(PIXEL) if images else None
    path.write_text(page_html([PageRun(label="run", report=report, examples=examples)]), encoding="utf-8")
    return path


def test_a_click_opens_a_class(window: Browser, tmp_path: Path) -> None:
    names = [f"kind {index}" for index in range(10)]
    window.open(written(tmp_path / "report.html", names, images=True))
    assert window.run("return document.querySelectorAll('#classes .row').length") == 10
    window.click("#classes [data-label='0']")
    title = "return document.getElementById('detail-title').textContent"
    assert window.run(title) == "kind 0"
    assert window.run("return document.querySelectorAll('#detail .taken li').length") > 0
    sizes = "return [...document.querySelectorAll('#detail img')].map(image => [image.complete, image.naturalWidth])"
    assert window.run(sizes) == [[True, 1]] * 3
    assert "kind 0 becomes kind 1" in window.run("return document.querySelector('#detail figcaption').textContent")
    # What it is taken for is a way to that class.
    other = window.run("return document.querySelector('#detail .taken button').textContent")
    window.click("#detail .taken button")
    assert window.run(title) == other != "kind 0"
    assert_quiet(window)


def test_attack_and_order_are_chosen(window: Browser, tmp_path: Path) -> None:
    window.open(written(tmp_path / "report.html", [f"kind {index}" for index in range(10)]))
    shown = "return [...document.querySelectorAll('#classes .number b')].map(e => Number(e.textContent))"
    choose = "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
    choose += "s.dispatchEvent(new Event('change', {bubbles: true}))"
    robust = window.run(shown)
    assert robust == sorted(robust)
    window.run(choose, "entry", "clean")
    clean = window.run(shown)
    assert clean == sorted(clean)
    assert sum(clean) > sum(robust)
    window.run(choose, "order", "label")
    order = "return [...document.querySelectorAll('#classes .row')].map(e => Number(e.dataset.label))"
    assert window.run(order) == list(range(10))
    window.click("#find")
    window.press("7")
    assert window.run(order) == [7]
    assert_quiet(window)


def test_keys_alone_reach_everything(window: Browser, tmp_path: Path) -> None:
    window.open(written(tmp_path / "report.html", [f"kind {index}" for index in range(10)]))
    window.run("document.querySelector('#classes .row[tabindex=\"0\"]').focus()")
    window.press("ArrowDown", "ArrowDown", "Enter")
    place = "return [...document.querySelectorAll('#classes .row')].findIndex(e => e.matches('[aria-pressed=true]'))"
    assert window.run(place) == 2
    window.press("End")
    assert window.run("return document.activeElement === [...document.querySelectorAll('#classes .row')].pop()")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert window.run(outline) == "solid"
    # Of the rows, the Tab key stops at one.
    assert window.run("return document.querySelectorAll('#classes .row[tabindex=\"0\"]').length") == 1
    window.run("document.querySelector('#matrix svg').focus()")
    said = window.run("return document.getElementById('cell').textContent")
    window.press("ArrowDown", "ArrowRight", "ArrowRight")
    assert window.run("return document.getElementById('cell').textContent") != said
    words = "return document.getElementById('fairness-text').textContent"
    assert window.run(words).startswith("0.5 (this model): average 60.0 %")
    window.run("document.getElementById('fairness').focus()")
    window.press("ArrowRight")
    assert window.run(words).startswith("1: average 75.0 %")
    assert window.run("return document.querySelector('#frontier-classes .number b').textContent") == "75.0"
    assert_quiet(window)


@pytest.mark.parametrize("width", [1280, 800, 375])
@pytest.mark.parametrize("count", [10, 1000])
def test_names_of_any_kind_at_any_width(window: Browser, tmp_path: Path, count: int, width: int) -> None:
    names = [*HOSTILE, *(f"kind {index}" for index in range(len(HOSTILE), count))]
    path = written(tmp_path / "report.html", names)
    assert path.stat().st_size < 2_000_000
    window.open(path, width=width)
    for label in range(len(HOSTILE)):
        window.run("document.querySelector(`#classes [data-label='${arguments[0]}']`)?.click()", label)
    if count > 40:
        assert window.run("return document.querySelectorAll('#classes .row').length") == 40
        window.click("#more")
        assert window.run("return document.querySelectorAll('#classes .row').length") == count
    assert window.run("return window.hacked") is None
    assert window.run("return document.querySelectorAll('script').length") == 3
    shown = window.run("return document.querySelector(\"#classes [data-label='0'] .name\").textContent")
    assert shown == HOSTILE[0]
    assert_quiet(window)


def test_paints_soon(window: Browser, tmp_path: Path) -> None:
    path = written(tmp_path / "report.html", [f"kind {index}" for index in range(10)], images=True)
    assert soonest_paint(window, path, limit=200) < 200


def test_nothing_may_be_loaded(window: Browser, tmp_path: Path) -> None:
    """The policy, tried: a page that asks for something is refused by the browser."""
    window.open(written(tmp_path / "report.html", [f"kind {index}" for index in range(10)]))
    window.run("const i = new Image(); i.src = 'https://example.invalid/x.png'; document.body.append(i)")
    window.run(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    )
    assert window.run("return window.hacked") is None
    said = window.log()
    assert len(said) == 2
    assert all("Content Security Policy" in line for line in said)
