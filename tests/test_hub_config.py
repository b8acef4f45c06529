"""Ids of repositories: the Hub's own rule, held against huggingface_hub's."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ham_hf.hub_config import is_hub_id, split_revision

NAMES = (
    *("mnist", "me/robust", "timm/resnet50.a1_in1k", "_me/_robust_", "a", "a/b", "1", "a.b-c_d", "x" * 96),
    *("me/" + "x" * 96, "x" * 97, "me/" + "x" * 97, "x" * 97 + "/me", "a/b/c", "a--b", "a..b", "me/a--b", "a.git"),
    *("a.git/b", "git", "-a", "a-", "me/-a", ".a", "a.", "../data", "./data", "/a", "a/", "", "a b", "a\n", "me/a@v1"),
    *("hf-hub:me/a", "https://huggingface.co/me/a", "a\\b", "~", "a--b/c..d"),
)


def accepted(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_is_that_of_huggingface_hub(name: str) -> None:
    assert is_hub_id(name) == accepted(name)
    assert is_hub_id(name, with_owner=True) == (accepted(name) and "/" in name)


def test_only_ascii_letters() -> None:
    assert not is_hub_id("café")
    assert not is_hub_id("me/文件")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("me/a", ("me/a", None)),
        ("me/a@v1", ("me/a", "v1")),
        ("hf-hub:me/a@refs/pr/1", ("me/a", "refs/pr/1")),
        ("me/a@", None),
        ("me/a@v 1", None),
        ("a", None),
        ("a@v1", None),
        ("local-dir:me/a", None),
        ("./me/a", None),
    ],
)
def test_ids_with_a_revision(source: str, expected: tuple[str, str | None] | None) -> None:
    assert split_revision(source) == expected
