"""Configuration: every setting, its checks, the command line and recipe files.

`settings` says what a setting is, `groups` lists them all, `yaml_text` turns text into values and back, `build` makes
a configuration of what was written, `cli` reads command lines.
"""

from __future__ import annotations

from ham_hf.config.build import load_train_config
from ham_hf.config.cli import parse_calibrate_config, parse_evaluate_config, parse_train_config
from ham_hf.config.groups import (
    AttackConfig,
    CalibrateConfig,
    CalibrationConfig,
    DataConfig,
    EvaluateConfig,
    EvaluationConfig,
    EvaluationThreatConfig,
    HubConfig,
    LearningRateDrop,
    ModelConfig,
    MoreEvaluationConfig,
    TrainConfig,
    TrainingConfig,
    config_to_dict,
    pixel_unit_problems,
)
from ham_hf.config.settings import ConfigError
from ham_hf.config.yaml_text import config_to_yaml

__all__ = [
    "AttackConfig",
    "CalibrateConfig",
    "CalibrationConfig",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "EvaluationThreatConfig",
    "HubConfig",
    "LearningRateDrop",
    "ModelConfig",
    "MoreEvaluationConfig",
    "TrainConfig",
    "TrainingConfig",
    "config_to_dict",
    "config_to_yaml",
    "load_train_config",
    "parse_calibrate_config",
    "parse_evaluate_config",
    "parse_train_config",
    "pixel_unit_problems",
]
