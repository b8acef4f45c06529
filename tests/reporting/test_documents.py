"""Cards, comparisons and the leaderboard as whole documents against the golden ones in ``tests/documents``."""

from __future__ import annotations

import pytest

from tests.support.documents import FOLDER, ROOT, documents


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return documents()


def test_every_golden_document_is_rendered(rendered: dict[str, str]) -> None:
    committed = {f"tests/documents/{path.name}" for path in FOLDER.iterdir()}
    assert committed == {name for name in rendered if name.startswith("tests/")}


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_documents_are_the_golden_ones(rendered: dict[str, str], name: str) -> None:
    """A wanted change: ``python -m tests.support.documents``, and read what changed."""
    assert rendered[f"tests/documents/{name}"] == (FOLDER / name).read_text(encoding="utf-8")


def test_the_card_of_the_repository_is_that_of_its_report(rendered: dict[str, str]) -> None:
    path = "model_cards/digits-ham/README.md"
    assert rendered[path] == (ROOT / path).read_text(encoding="utf-8")


def test_nothing_private_or_hostile_gets_through(rendered: dict[str, str]) -> None:
    for name, text in rendered.items():
        assert "/secret/" not in text
        assert "<b>" not in text or name.endswith(".html"), name
