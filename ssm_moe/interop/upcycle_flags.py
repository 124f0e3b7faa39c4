"""The flags of `experiments/convert.py --upcycle`, and what is made of a model by them."""

import ast
import dataclasses
from typing import Any

import jax
from absl import flags

from ssm_moe.config import (
  ConfigError,
  ExperimentConfig,
  LoRAConfig,
  ModelConfig,
  MoEConfig,
  RoMConfig,
  from_config_dict,
  to_dict,
)
from ssm_moe.errors import UserError
from ssm_moe.interop import upcycle
from ssm_moe.shapes import PyTree

_UPCYCLE = flags.DEFINE_enum(
  'upcycle',
  None,
  ['rom', 'moe_mamba'],
  'Writes a workdir in which the model has experts, and computes what it did: rom copies '
  'projections to experts, moe_mamba puts in feed-forward experts whose output is zero.',
)
_NUM_EXPERTS = flags.DEFINE_integer('num_experts', None, 'Of each layer; 8 if not given.')
_TOP_K = flags.DEFINE_integer('top_k', None, 'Experts of a token; 1 if not given.')
_PROJECTIONS = flags.DEFINE_list(
  'projections', None, 'For rom, out of conv, gate, out, x, dt; the first three if not given.'
)
_LAYERS = flags.DEFINE_list(
  'layers',
  None,
  'Depths of Mamba layers, counted over all layers from 0, and ranges START:STOP:STEP of depths; '
  'all Mamba layers if not given.',
)
_EXPERT_NOISE = flags.DEFINE_float(
  'expert_noise', 0.0, 'For rom: noise on each expert, relative to the size of its weights.'
)
_ROUTING = flags.DEFINE_multi_string(
  'routing',
  [],
  'NAME=VALUE, any other field of how to route, such as load_balancing_coefficient=0.01 or '
  'dispatch=dropless; may be repeated.',
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Of routers, noise and feed-forward experts.', lower_bound=0, upper_bound=2**32 - 1
)
_OF_ROM = (_PROJECTIONS.name, _EXPERT_NOISE.name)
_ALL = (_NUM_EXPERTS, _TOP_K, _PROJECTIONS, _LAYERS, _EXPERT_NOISE, _ROUTING, _SEED)


def requested() -> bool:
  """Returns whether --upcycle is given.

  Raises:
    UserError: a flag is given that has no meaning then, or without it.
  """
  kind = _UPCYCLE.value
  for flag in _ALL:
    if flag.present and kind is None:
      raise UserError(f'--{flag.name} belongs to --upcycle, which is not given')
    if flag.present and kind != 'rom' and flag.name in _OF_ROM:
      raise UserError(f'--{flag.name} belongs to --upcycle=rom, not {kind}')
  return kind is not None


def upcycled(experiment: ExperimentConfig, params: PyTree) -> tuple[ExperimentConfig, PyTree, str]:
  """Returns the experiment and the parameters of the model with experts, and what was done.

  Args:
    experiment: Of a run, or made of a model.
    params: Of its model.

  Raises:
    UserError: the flags ask for what is not possible; in the words of the flags.
  """
  config = experiment.model
  try:
    layers = None if _LAYERS.value is None else _depths(_LAYERS.value)
    key = jax.random.key(_SEED.value)
    if _UPCYCLE.value == 'rom':
      rom = _as_asked(_rom_of(config), _projections())
      noise = _EXPERT_NOISE.value
      model, params = upcycle.to_rom(config, params, rom, key, layers=layers, expert_noise=noise)
    else:
      new = MoEConfig(num_experts=RoMConfig.num_experts)
      moe = _as_asked(config.moe if 'E' in config.layers else new, {})
      model, params = upcycle.to_moe_mamba(config, params, moe, key, layers=layers)
  except ConfigError as error:
    raise UserError(f'--upcycle={_UPCYCLE.value}: {error}') from None
  # The adapters of the run are merged in its parameters, and those of another were before.
  train = dataclasses.replace(experiment.train, initialize_from=None)
  experiment = dataclasses.replace(experiment, model=model, lora=LoRAConfig(), train=train)
  done = f'upcycled to {model.num_periods} x {model.pattern!r} with {_UPCYCLE.value}'
  return experiment, params, done


def _rom_of(config: ModelConfig) -> RoMConfig:
  """Returns how the model routes already, or how copies are best routed."""
  there = [own for own in config.routings().values() if isinstance(own, RoMConfig)]
  return there[0] if there else RoMConfig(kind='shared', weights='uniform')


def _projections() -> dict[str, Any]:
  return {} if _PROJECTIONS.value is None else {'expert_projections': tuple(_PROJECTIONS.value)}


def _as_asked(base: RoMConfig | MoEConfig, changes: dict[str, Any]) -> RoMConfig | MoEConfig:
  changes = dict(changes)
  for flag in (_NUM_EXPERTS, _TOP_K):
    if flag.value is not None:
      changes[flag.name] = flag.value
  for text in _ROUTING.value:
    name, equals, value = text.partition('=')
    if not equals or not name:
      raise UserError(f'--routing={text}: it must be NAME=VALUE')
    changes[name] = _literal(value)
  if changes.get('kind') == 'independent':
    changes = {'weight_at': 'each'} | changes  # the only one that such routers learn by
  return from_config_dict(to_dict(base) | changes, type(base), 'routing')


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _depths(items: list[str]) -> list[int]:
  depths = []
  for item in items:
    try:
      numbers = [int(number) for number in item.split(':')]
      depths += numbers if len(numbers) == 1 else list(range(*numbers))
    except (ValueError, TypeError):
      raise UserError(
        f'--layers: {item!r} is no depth, and no range of depths START:STOP or START:STOP:STEP'
      ) from None
  return depths
