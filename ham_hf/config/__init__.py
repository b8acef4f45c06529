"""Configurations, from command lines and recipe files.

`configs` groups the components' settings, `yaml_file` turns text into values and back, `assembly` builds a
configuration from parsed entries, `command_line` reads command lines.
"""

from __future__ import annotations

from ham_hf.config.assembly import load_train_config as load_train_config
from ham_hf.config.command_line import (
    parse_calibrate_config as parse_calibrate_config,
    parse_evaluate_config as parse_evaluate_config,
    parse_train_config as parse_train_config,
)
from ham_hf.config.configs import (
    CalibrateConfig as CalibrateConfig,
    EvaluateConfig as EvaluateConfig,
    TrainConfig as TrainConfig,
    config_to_dict as config_to_dict,
)
from ham_hf.config.yaml_file import config_to_yaml as config_to_yaml
from ham_hf.data.config import DataConfig as DataConfig
from ham_hf.evaluation.config import (
    CalibrationConfig as CalibrationConfig,
    EvaluationConfig as EvaluationConfig,
    ThreatConfig as ThreatConfig,
)
from ham_hf.hub_config import HubConfig as HubConfig
from ham_hf.models.config import ModelConfig as ModelConfig
from ham_hf.settings import ConfigError as ConfigError
from ham_hf.training.config import (
    AttackConfig as AttackConfig,
    LearningRateDrop as LearningRateDrop,
    TrainingConfig as TrainingConfig,
)
