"""Configurations, from command lines and recipe files.

`configs` groups the components' settings, `yaml_file` turns text into values and back, `assembly` builds a
configuration from parsed entries, `command_line` reads command lines.
"""

from __future__ import annotations

from ham_hf.config.assembly import load_train_config
from ham_hf.config.command_line import parse_calibrate_config, parse_evaluate_config, parse_train_config
from ham_hf.config.configs import CalibrateConfig, EvaluateConfig, TrainConfig, config_to_dict
from ham_hf.config.yaml_file import config_to_yaml
from ham_hf.data.config import DataConfig
from ham_hf.evaluation.config import CalibrationConfig, EvaluationConfig, MoreEvaluationConfig, ThreatConfig
from ham_hf.hub_config import HubConfig
from ham_hf.models.config import ModelConfig
from ham_hf.settings import ConfigError
from ham_hf.training.config import AttackConfig, LearningRateDrop, TrainingConfig

__all__ = [
    "AttackConfig",
    "CalibrateConfig",
    "CalibrationConfig",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "HubConfig",
    "LearningRateDrop",
    "ModelConfig",
    "MoreEvaluationConfig",
    "ThreatConfig",
    "TrainConfig",
    "TrainingConfig",
    "config_to_dict",
    "config_to_yaml",
    "load_train_config",
    "parse_calibrate_config",
    "parse_evaluate_config",
    "parse_train_config",
]
