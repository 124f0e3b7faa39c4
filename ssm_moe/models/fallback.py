"""An expert that stands in for all others, for a model that was trained without one.

A token whose best score is below `fallback_threshold` takes it: in feed-forward layers the shared
experts alone, in projections one more matrix, at index E. A trained Routing Mamba has no such
matrix; the mean of its experts is one, and gives a threshold something to fall back to.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ssm_moe.config import Mamba2Config, MambaConfig, ModelConfig, RoMConfig
from ssm_moe.layers import rom as rom_lib
from ssm_moe.models.block import layer_names
from ssm_moe.shapes import PyTree

# Positive, so that the matrix is there, and below every score but one that underflows.
NEVER = float(np.finfo(np.float32).tiny)

_MODULES = {
  'conv': 'conv_proj',
  'gate': 'gate_proj',
  'out': 'out_proj',
  'x': 'x_proj',
  'dt': 'dt_proj',
}


def with_mean_expert(params: PyTree, config: ModelConfig) -> tuple[PyTree, ModelConfig]:
  """Returns the model with the mean of its experts as one more matrix of each routed projection.

  Arrays [periods, E, ...] become [periods, E + 1, ...]; of experts of two matrices, each is the
  mean of its kind. The threshold is `NEVER`, so that the function of the model stays what it was;
  `with_threshold` raises it. Mixers that have such a matrix, and feed-forward layers, stay as they
  are.

  Args:
    params: Of the model, without flax boxes.
    config: Of the model.
  """
  periods = dict(params['periods'])
  for name, letter in layer_names(config).items():
    if letter not in 'MS':
      continue
    rom = config.routing_of(letter)
    if rom is None or rom.fallback_threshold:
      continue
    layer = dict(periods[f'layer_{name}'])
    for module in _routed_modules(rom):
      layer[module] = {
        key: value if key == 'bias' else _with_mean(value) for key, value in layer[module].items()
      }
    periods[f'layer_{name}'] = layer
  return {**params, 'periods': periods}, _replaced(config, NEVER, only_missing=True)


def with_threshold(config: ModelConfig, threshold: float) -> ModelConfig:
  """Returns the config in which every layer that has something to fall back to does so.

  Args:
    config: Of a model whose routed projections have a matrix for it (see `with_mean_expert`).
    threshold: Of a token's best score; `NEVER` for 0, which would take the matrix away.
  """
  return _replaced(config, max(threshold, NEVER), only_missing=False)


def can_fall_back(config: ModelConfig, letter: str) -> bool:
  """Whether layers of a pattern letter route projections, or have shared experts beside routed."""
  if letter == 'E':
    own = config.moe.routing == 'own' and config.moe.choice == 'token'
    return own and config.moe.num_shared_experts > 0
  return config.routing_of(letter) is not None


def _replaced(config: ModelConfig, threshold: float, *, only_missing: bool) -> ModelConfig:
  changes = {}
  for letter, name in (('M', 'mamba'), ('S', 'mamba2')):
    rom = config.routing_of(letter)
    if letter in config.layers and rom is not None:
      if only_missing and rom.fallback_threshold:
        continue
      mixer: MambaConfig | Mamba2Config = getattr(config, name)
      rom = dataclasses.replace(rom, fallback_threshold=threshold)
      changes[name] = dataclasses.replace(mixer, rom=rom)
  if not only_missing and 'E' in config.layers and can_fall_back(config, 'E'):
    changes['moe'] = dataclasses.replace(config.moe, fallback_threshold=threshold)
  return dataclasses.replace(config, **changes)


def _routed_modules(rom: RoMConfig) -> list[str]:
  modules = dict(_MODULES)
  if rom_lib.one_in_projection(rom):
    modules |= {'conv': 'in_proj', 'gate': 'in_proj'}
  return list(dict.fromkeys(modules[name] for name in rom.expert_projections))


def _with_mean(experts):
  return jnp.concatenate([experts, jnp.mean(experts, axis=1, keepdims=True)], axis=1)
