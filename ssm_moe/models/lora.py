"""Low-rank adapters beside the parameters of a model, which its layers know nothing of.

W' = W + alpha / rank * down up,    down: [..., inputs, rank], up: [..., rank, outputs].
LoRA, section 4.1 (https://arxiv.org/abs/2106.09685). `up` starts at zero, so that W' starts at W.
Matrices that are stacked, over periods or experts, have adapters each.

The model is always run with W', made anew of W and the adapters: that costs the memory of the
adapted matrices once more, and of their gradients, but no moments.
"""

import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import ConfigError, LoRAConfig
from ssm_moe.layers import initializers
from ssm_moe.shapes import Array, PyTree

# Logical axes that count matrices, and those that a linear map reads.
_STACKED = ('layers', 'expert')
_INPUTS = ('embed', 'inner', 'mlp', 'rank', 'heads')


def init(key: Array, params: PyTree, config: LoRAConfig) -> PyTree:
  """Returns adapters that change nothing yet: a tree of its targets alone, {'down', 'up'} at each.

  Args:
    key: Of the random halves.
    params: Of the model, in flax boxes, whose logical axes the adapters take over.
    config: Rank and targets.

  Raises:
    ConfigError: a pattern is the path of no matrix.
  """
  boxes = jax.tree.leaves_with_path(params, is_leaf=_is_box)
  matrices = {path_name(path): box for path, box in boxes if _is_matrix(path, box)}
  check_patterns('config.lora.targets', config.targets, matrices, 'matrix')
  adapters = {}
  for i, (name, box) in enumerate(matrices.items()):
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.targets):
      *parents, last = name.split('/')
      place = adapters
      for parent in parents:
        place = place.setdefault(parent, {})
      place[last] = _adapter(jax.random.fold_in(key, i), box, config.rank)
  return adapters


def merged(params: PyTree, adapters: PyTree | None, config: LoRAConfig) -> PyTree:
  """Returns the parameters that the model runs with: plain ones, for any use.

  Args:
    params: Of the model, without boxes.
    adapters: As `init` makes them, without boxes; None changes nothing.
    config: Rank and alpha.
  """
  if adapters is None:
    return params
  if not isinstance(params, dict):
    return params + config.alpha / config.rank * _product(params, adapters['down'], adapters['up'])
  return {
    name: merged(below, adapters[name], config) if name in adapters else below
    for name, below in params.items()
  }


def path_name(path: tuple[Any, ...]) -> str:
  """Returns 'periods/layer_mamba_0/in_proj/kernel' for the path of a parameter."""
  # Flax boxes add an attribute to the path, below the parameter's own name.
  keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
  return '/'.join(keys)


def check_patterns(field: str, patterns: tuple[str, ...], names: Any, what: str) -> None:
  """Raises ConfigError if a pattern fits no name; the message has names that it could fit.

  Args:
    field: That the patterns are of, for the message.
    patterns: To be looked at.
    names: Paths that there are.
    what: They are of: parameter or matrix.
  """
  for pattern in patterns:
    if not fnmatch.filter(names, pattern):
      raise ConfigError(
        f'{field}: {pattern!r} is the path of no {what}; there are: {", ".join(names)}'
      )


def _is_box(leaf: Any) -> bool:
  return isinstance(leaf, nn.Partitioned)


def _is_matrix(path: tuple[Any, ...], box: nn.Partitioned) -> bool:
  # A_log is a table of decay rates, by channel and state.
  own = [name for name in box.names if name not in _STACKED]
  return len(own) > 1 and own[0] in _INPUTS and path_name(path).split('/')[-1] != 'A_log'


def _adapter(key: Array, box: nn.Partitioned, rank: int) -> dict[str, nn.Partitioned]:
  """Returns the adapter of a matrix, or of each of those that are stacked."""
  shape, names = box.value.shape, box.names
  first = sum(axis in _STACKED for axis in names)
  # Attention reads heads and their channels together.
  last = first + (2 if names[first : first + 2] == ('heads', 'head_dim') else 1)
  inputs, outputs = math.prod(shape[first:last]), math.prod(shape[last:])
  rank = min(rank, inputs, outputs)
  down = initializers.linear(inputs)(key, (*shape[:last], rank))
  up = jnp.zeros((*shape[:first], rank, *shape[last:]), jnp.float32)
  return {
    'down': box.replace(value=down, names=(*names[:last], 'adapter')),
    'up': box.replace(value=up, names=(*names[:first], 'adapter', *names[last:])),
  }


def _product(matrix: Array, down: Array, up: Array) -> Array:
  """Returns down up in the shape of the matrix: [..., inputs, rank] times [..., rank, outputs]."""
  # Between them, down has all axes but the outputs, and up all but the inputs.
  axes = 'abcdefgh'[: matrix.ndim]
  last = down.ndim - 1
  first = last + up.ndim - 1 - matrix.ndim
  return jnp.einsum(
    f'{axes[:last]}r,{axes[:first]}r{axes[last:]}->{axes}',
    down,
    up,
    precision=jax.lax.Precision.HIGHEST,
  )
