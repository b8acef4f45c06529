"""Settings that several classes share are declared once."""

from __future__ import annotations

from dataclasses import MISSING, replace

import pytest

from ham_hf.config import CalibrateConfig, TrainingConfig
from ham_hf.config.configs import EvaluateConfig
from ham_hf.settings import settings_of


@pytest.mark.parametrize("config_class", [EvaluateConfig, CalibrateConfig])
def test_a_shared_setting_has_one_default_and_range_and_may_have_its_own_help(config_class: type) -> None:
    own, training = ({known.name: known for known in settings_of(kind)} for kind in (config_class, TrainingConfig))
    for name in ("use_cpu", "ddp_timeout", "disable_tqdm"):
        assert own[name] == training[name]
    assert own["seed"] == replace(training["seed"], help=own["seed"].help)
    assert own["seed"].help != training["seed"].help
    assert own["model"].default is MISSING
