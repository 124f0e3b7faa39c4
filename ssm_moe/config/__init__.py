"""Every field that can be set, with its default, written once.

Frozen dataclasses hold the values; `defaults()` gives them as a `ConfigDict`, which config files
under `experiments/configs` change and command-line flags override; `from_config_dict` turns that
back into dataclasses, and answers an unknown key, a wrong type or a contradiction with one line.

A `None` default is an optional scalar. Units are in the name or in the comment.
"""

from ssm_moe.config.checks import ConfigError
from ssm_moe.config.experiment import (
  DataConfig,
  ExperimentConfig,
  LoRAConfig,
  MeshConfig,
  OptimizerConfig,
  SampleConfig,
  TrainConfig,
)
from ssm_moe.config.layers import (
  AttentionConfig,
  Mamba2Config,
  MambaConfig,
  MLPConfig,
  NormConfig,
)
from ssm_moe.config.model import LAYER_WORDS, ModelConfig
from ssm_moe.config.parsing import (
  check_key,
  check_value,
  defaults,
  from_config_dict,
  from_flag,
  from_json,
  to_config_dict,
  to_dict,
)
from ssm_moe.config.routing import MoEConfig, RoMConfig, RoutingConfig

__all__ = [
  'LAYER_WORDS',
  'AttentionConfig',
  'ConfigError',
  'DataConfig',
  'ExperimentConfig',
  'LoRAConfig',
  'MLPConfig',
  'Mamba2Config',
  'MambaConfig',
  'MeshConfig',
  'MoEConfig',
  'ModelConfig',
  'NormConfig',
  'OptimizerConfig',
  'RoMConfig',
  'RoutingConfig',
  'SampleConfig',
  'TrainConfig',
  'check_key',
  'check_value',
  'defaults',
  'from_config_dict',
  'from_flag',
  'from_json',
  'to_config_dict',
  'to_dict',
]
