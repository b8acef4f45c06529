"""Files that are replaced in one step, and strict JSON."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ham_hf.files import atomic_write, parse_json


def test_a_file_is_replaced_in_one_step_with_its_content_on_the_disk_first(tmp_path, monkeypatch):
    path, done = tmp_path / "report.json", list[tuple[str, str | None]]()
    atomic_write(path, "old\r\nä\n")
    assert path.read_bytes() == "old\r\nä\n".encode()
    fsync, rename = os.fsync, os.replace

    def flushed(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name if Path("/proc/self/fd").exists() else ""
        done.append((f"flush {name}", path.read_text()))
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        done.append(("rename", Path(old).read_text()))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    atomic_write(path, "new")
    names = [action.split()[0] for action, _ in done]
    assert names == ["flush", "rename", "flush"]
    assert [text for _, text in done] == ["old\nä\n", "new", "new"]
    if Path("/proc/self/fd").exists():
        assert [action for action, _ in done] == ["flush report.json.part", "rename", f"flush {tmp_path.name}"]
    assert [found.name for found in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(("module", "call"), [(os, "fsync"), (os, "replace"), (Path, "write_text")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, module, call):
    path = tmp_path / "report.json"
    atomic_write(path, "old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, call, full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("text", ["NaN", "[1, Infinity]", '{"a": -Infinity}'])
def test_numbers_that_json_does_not_have_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="is not a JSON number"):
        parse_json(text)


def test_json_is_read() -> None:
    assert parse_json('{"a": [1, 2.5, null, "NaN"]}') == {"a": [1, 2.5, None, "NaN"]}
