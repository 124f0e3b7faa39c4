"""Trained models that grow experts, and go on computing what they did.

`to_rom` makes Mamba layers into Routing Mamba: each chosen projection is copied to every expert.
`to_moe_mamba` puts a sparse feed-forward layer behind them, whose output starts at zero. Either is
done to all Mamba and Mamba-2 layers or to some, and may be repeated for others: step by step.

Experts that are equal are the layer they are copied from only if a token's weights add up to 1: a
score of a softmax over E experts would scale the output by about 1 / E. Hence `weights='uniform'`,
which has a forward value of 1 / top_k and the gradient of the score. Equal experts part with the
first step all the same: routers start small but random, so that experts see different tokens.

How exact: behind a layer that was put in, x + 0 is x to the bit. A projection with experts
multiplies the same numbers as the dense one, but in rows that stand in another order, and a matmul
may add up in another order then; and three thirds are rounded. So Routing Mamba is equal to float32
rounding.

Layers that are left out have the pattern letter of a mixer without experts (m, s). A pattern that
no longer repeats as it did is written out as far as it takes, and the parameters are stacked anew.
"""

import dataclasses
import math
import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import ConfigError, ModelConfig, MoEConfig, RoMConfig
from ssm_moe.layers.rom import one_in_projection
from ssm_moe.models import lm
from ssm_moe.models.block import layer_groups
from ssm_moe.shapes import Array, Float, Key, PyTree

# Of the model's own initial routers. Which expert is a token's best does not depend on it; that the
# first steps can change it does, and scores begin nearly even.
ROUTER_SCALE = 0.1

_MIXERS = 'MmSs'
_PROJECTIONS = ('conv', 'gate', 'out', 'x', 'dt')


class _Group(NamedTuple):
  """The parameters of layers that share a norm, at one depth."""

  norm: dict[str, Array]
  layers: list[dict[str, Any]]


def to_rom(
  config: ModelConfig,
  params: PyTree,
  rom: RoMConfig,
  key: Key[Array, ''],
  *,
  layers: Collection[int] | None = None,
  expert_noise: float = 0.0,
) -> tuple[ModelConfig, PyTree]:
  """Returns a model whose chosen mixers route their projections, equal to the one given.

  Layers and projections that have experts already keep them, and more of both can be chosen later.

  Args:
    config: Of the model.
    params: Of the model, without flax boxes.
    rom: How to route; of a model that does, as it does, but for more `expert_projections`.
    key: Of the routers and the noise.
    layers: Depths, counted over all layers from 0, of Mamba or Mamba-2; all of these if None.
    expert_noise: Deviation of what is added to each new expert, as a part of the root mean square
      of its matrix. The function is preserved with 0 only.

  Raises:
    ConfigError: `rom` would not preserve the function, or layers cannot be chosen so.
  """
  _check_rom(rom)
  if not 0 <= expert_noise < math.inf:
    raise ConfigError(f'expert_noise is {expert_noise}; it must be finite and not negative')
  if 'E' in config.layers and config.moe.routing == 'mixer':
    raise ConfigError('moe.routing is mixer; its layers would take over other decisions')
  chosen = _chosen(config, layers)
  letters = [
    _lettered(letter, depth in chosen or config.routing_of(letter) is not None)
    for depth, letter in enumerate(config.layers * config.num_periods)
  ]
  changes = {}
  for name, letter in _LETTERS.items():
    if letter in letters:
      before = config.routing_of(letter) if letter in config.layers else None
      joined = rom if before is None else _joined(before, rom, name)
      changes[name] = dataclasses.replace(getattr(config, name), rom=joined)
  depths = iter(letters)
  periods = [
    [''.join(next(depths) for _ in group) for group in config.groups]
    for _ in range(config.num_periods)
  ]
  new_config = dataclasses.replace(config, **_shortest(config, periods), **changes)
  if new_config == config:
    raise ConfigError('every chosen layer has experts on these projections already')

  @jax.jit
  def grow(params, key):
    fresh_key, noise_key = jax.random.split(key)
    groups, depth = [], 0
    for old, fresh in zip(
      _apart(config, params), _apart(new_config, _fresh(new_config, fresh_key)), strict=True
    ):
      grown = []
      for layer, new in zip(old.layers, fresh.layers, strict=True):
        after = new_config.routing_of(letters[depth])
        if letters[depth] in _LETTERS.values():
          before = config.routing_of(config.layers[depth % len(config.layers)]) or RoMConfig()
          noise = (jax.random.fold_in(noise_key, depth), expert_noise)
          layer = _with_experts(layer, new, before, after, noise)
        grown.append(layer)
        depth += 1
      groups.append(_Group(old.norm, grown))
    return _together(new_config, params, groups)

  return new_config, grow(params, key)


def to_moe_mamba(
  config: ModelConfig,
  params: PyTree,
  moe: MoEConfig,
  key: Key[Array, ''],
  *,
  layers: Collection[int] | None = None,
) -> tuple[ModelConfig, PyTree]:
  """Returns a model with a sparse feed-forward layer after each chosen mixer, equal to the given.

  The last matrices of the new experts are zero; the first, and the routers, are random.

  Args:
    config: Of the model.
    params: Of the model, without flax boxes.
    moe: Of the layers that are put in; of a model that has such layers, the same.
    key: Of the new parameters.
    layers: Depths of mixers, counted over all layers from 0; all Mamba and Mamba-2 layers if None.

  Raises:
    ConfigError: `moe` is not that of the layers that are there, or layers cannot be chosen so.
  """
  if moe.routing != 'own':
    raise ConfigError(f'moe.routing is {moe.routing}; of a layer that is put in it must be own')
  if 'E' in config.layers and moe != config.moe:
    raise ConfigError(f'moe must be as in the layers that are there: {_first(config.moe, moe)}')
  chosen, depth = _chosen(config, layers), 0
  periods = []
  for _ in range(config.num_periods):
    period = []
    for group in config.groups:
      period.append((group, False))
      if chosen.intersection(range(depth, depth + len(group))):
        period.append(('E', True))
      depth += len(group)
    periods.append(period)
  is_new = [new for period in periods for _, new in period]
  lettered = [[letters for letters, _ in period] for period in periods]
  new_config = dataclasses.replace(config, moe=moe, **_shortest(config, lettered))

  @jax.jit
  def grow(params, key):
    old = iter(_apart(config, params))
    fresh = _apart(new_config, _fresh(new_config, key))
    groups = [_silent(group) if new else next(old) for group, new in zip(fresh, is_new)]
    return _together(new_config, params, groups)

  return new_config, grow(params, key)


# The letter with experts of each kind of mixer.
_LETTERS = {'mamba': 'M', 'mamba2': 'S'}


def _check_rom(rom: RoMConfig) -> None:
  """Checks that copies of a dense projection can do what it did."""
  allowed = {
    'kind': ('shared', 'independent'),
    'weights': ('uniform',),
    'dispatch': ('dropless', 'dense'),
    'bottleneck': (None,),
    'fallback_threshold': (0.0,),
  }
  for name, values in allowed.items():
    value = getattr(rom, name)
    if value not in values:
      raise ConfigError(
        f'rom.{name} is {value}; experts copied from a dense layer are together what it was with '
        f'{" or ".join(map(str, values))} only'
      )


def _chosen(config: ModelConfig, layers: Collection[int] | None) -> set[int]:
  letters = config.layers * config.num_periods
  mixers = [depth for depth, letter in enumerate(letters) if letter in _MIXERS]
  if not mixers:
    raise ConfigError(f'the pattern {config.pattern!r} has no Mamba or Mamba-2 layer')
  chosen = set(mixers if layers is None else layers)
  if not chosen:
    raise ConfigError('layers is empty; name at least one')
  for depth in sorted(chosen.difference(mixers)):
    there = ', '.join(map(str, mixers))
    raise ConfigError(f'layers has {depth}; Mamba and Mamba-2 layers of this model are {there}')
  return chosen


def _lettered(letter: str, routed: bool) -> str:
  """Returns the pattern letter of a layer with or without experts on its projections."""
  if letter not in _MIXERS:
    return letter
  return letter.upper() if routed else letter.lower()


def _joined(before: RoMConfig, rom: RoMConfig, mixer: str) -> RoMConfig:
  """Returns `rom` with the projections that are routed already; else it must be as before."""
  both = {*before.expert_projections, *rom.expert_projections}
  joined = tuple(name for name in _PROJECTIONS if name in both)
  # Names in another order are the same projections.
  joined = before.expert_projections if set(before.expert_projections) == both else joined
  rom, before = (dataclasses.replace(own, expert_projections=joined) for own in (rom, before))
  if rom != before:
    raise ConfigError(f'{mixer}.rom must be as in the layers that route: {_first(before, rom)}')
  return rom


def _first(there: Any, here: Any) -> str:
  """Returns the first field in which two dataclasses differ."""
  names = (field.name for field in dataclasses.fields(there))
  name = next(name for name in names if getattr(there, name) != getattr(here, name))
  return f'{name} is {getattr(there, name)} there, not {getattr(here, name)}'


def _shortest(config: ModelConfig, periods: list[list[str]]) -> dict[str, Any]:
  """Returns the pattern and num_periods of layers, given by period in groups that share a norm."""
  if not any(getattr(own, 'kind', None) == 'period' for own in config.routings().values()):
    # No layer takes over what another of its period has decided: periods can be cut.
    periods = [[group] for period in periods for group in period]
  patterns = [' '.join('+'.join(group) for group in period) for period in periods]
  count = len(patterns)
  length = next(n for n in range(1, count + 1) if patterns == patterns[:n] * (count // n))
  return {'pattern': ' '.join(patterns[:length]), 'num_periods': count // length}


def _fresh(config: ModelConfig, key: Array) -> PyTree:
  """Returns initial parameters; jitted, only those that are used are made."""
  return nn.unbox(lm.boxed_params(config, key))


def _apart(config: ModelConfig, params: PyTree) -> list[_Group]:
  """Returns the parameters of a model's layers, from the first to the last."""
  groups = []
  for period in range(config.num_periods):
    own = jax.tree.map(operator.itemgetter(period), params['periods'])
    for names in layer_groups(config):
      norm = own[f'norm_{next(iter(names))}']
      groups.append(_Group(norm, [own[f'layer_{name}'] for name in names]))
  return groups


def _together(config: ModelConfig, params: PyTree, groups: list[_Group]) -> PyTree:
  """Returns `params` with these layers in place of its own, stacked as `config` has them."""
  periods, length = {}, len(config.groups)
  for i, names in enumerate(layer_groups(config)):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups[i::length])
    periods[f'norm_{next(iter(names))}'] = stacked.norm
    periods |= {f'layer_{name}': layer for name, layer in zip(names, stacked.layers)}
  return {**params, 'periods': periods}


def _with_experts(
  layer: dict[str, Any],
  fresh: dict[str, Any],
  before: RoMConfig,
  after: RoMConfig,
  noise: tuple[Array, float],
) -> dict[str, Any]:
  """Returns a mixer whose projections have the experts of `after`, those of `before` as they are.

  Args:
    layer: Parameters of the mixer.
    fresh: Initial ones, of which the routers are used.
    before: How it routes; kind none if it does not.
    after: How it is to.
    noise: Key and relative deviation.
  """
  layer = dict(layer)
  if one_in_projection(before):
    both = layer.pop('in_proj')
    for i, name in enumerate(('conv', 'gate')):
      layer[f'{name}_proj'] = jax.tree.map(lambda leaf, i=i: leaf[..., i, :], both)
  routed = () if before.kind == 'none' else before.expert_projections
  for i, name in enumerate(_PROJECTIONS):
    if name in after.expert_projections and name not in routed:
      # A bias is shared by the experts.
      module, key = layer[f'{name}_proj'], jax.random.fold_in(noise[0], i)
      kernel = _copies(module['kernel'], after.num_experts, key, noise[1])
      layer[f'{name}_proj'] = module | {'kernel': kernel}
  if one_in_projection(after):
    halves = layer.pop('conv_proj'), layer.pop('gate_proj')
    layer['in_proj'] = jax.tree.map(lambda *two: jnp.stack(two, axis=-2), *halves)
  return layer | {'routing': _small(fresh['routing']) | layer.get('routing', {})}


def _copies(
  matrix: Float[Array, '*M'], num_experts: int, key: Array, relative_noise: float
) -> Float[Array, 'E *M']:
  copies = jnp.broadcast_to(matrix, (num_experts, *matrix.shape))
  if not relative_noise:
    return copies
  deviation = relative_noise * jnp.sqrt(jnp.mean(jnp.square(matrix)))
  return copies + deviation * jax.random.normal(key, copies.shape, copies.dtype)


def _small(routers: dict[str, Any]) -> dict[str, Any]:
  """Returns initial routers, scaled down; a selection bias is zero, and stays."""
  return jax.tree.map(lambda leaf: ROUTER_SCALE * leaf, routers)


def _silent(group: _Group) -> _Group:
  """Returns an initial sparse feed-forward layer whose output is zero."""
  (layer,) = group.layers
  layer = layer | _small({'router': layer['router']}) | {'wo': jnp.zeros_like(layer['wo'])}
  if 'shared_experts' in layer:
    shared = layer['shared_experts']
    layer['shared_experts'] = shared | {'wo': jnp.zeros_like(shared['wo'])}
  return _Group(group.norm, [layer])
