"""The golden files are the ones that the authors' code wrote."""

from __future__ import annotations

import hashlib

from tests.support.golden_data import GOLDEN


def test_no_golden_file_was_changed_added_or_removed():
    recorded = dict(reversed(line.split(maxsplit=1)) for line in (GOLDEN / "SHA256SUMS").read_text().splitlines())
    files = {path.name: path for path in GOLDEN.iterdir() if path.suffix in (".json", ".safetensors")}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == recorded
