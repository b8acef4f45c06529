"""The run that faults are compared with."""

from __future__ import annotations

import pytest

from tests.support.training import trainer


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Three epochs of six updates: checkpoints after updates 4, 8, 12, 16 and 18, validations after 6, 12 and 18."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    return folder, trainer(folder).fit()
