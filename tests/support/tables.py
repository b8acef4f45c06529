"""Long tables of test cases are YAML files beside their tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def cases(test_file: str, name: str) -> Any:
    return yaml.safe_load((Path(test_file).parent / name).read_text(encoding="utf-8"))
