"""A run that starts from the parameters of another."""

import functools
import pathlib

import jax
from flax import linen as nn

from ssm_moe.config import ConfigError, ExperimentConfig, ModelConfig, to_dict
from ssm_moe.errors import UserError
from ssm_moe.models import lm, lora
from ssm_moe.shapes import PyTree
from ssm_moe.training.checkpoint import differences
from ssm_moe.training.trained import restore_params
from ssm_moe.training.workdir import read_config

_FIELD = 'config.train.initialize_from'


def check(config: ExperimentConfig, workdir: pathlib.Path) -> None:
  """Checks, if the run is to start from another, that it can: before anything takes long.

  Args:
    config: Of the run that starts.
    workdir: Of the same.

  Raises:
    ConfigError: there is no other run, it has no checkpoint, or its parameters are others.
  """
  if config.train.initialize_from is None:
    return
  source = pathlib.Path(config.train.initialize_from)
  if source.resolve() == workdir.resolve():
    raise ConfigError(f'{_FIELD}: {source} is the workdir of this run; give that of another')
  there, here = _shapes(_experiment(source).model), _shapes(config.model)
  others = [name for name in here | there if there.get(name) != here.get(name)]
  if others:
    first, more = others[0], len(others) - 1
    has, needs = (tree.get(first, 'absent') for tree in (there, here))
    raise ConfigError(
      f'{_FIELD}: {source} has other parameters: {first} is {has} there and {needs} here'
      + (f', and {more} more differ' if more else '')
    )
  if not any((source / 'checkpoints').glob('[0-9]*')):
    raise ConfigError(f'{_FIELD}: {source} has no checkpoint; train it first')


def read(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> tuple[PyTree, list[str]]:
  """Returns the parameters of the run that this one starts from, and what to tell the user.

  Args:
    config: Of the run that starts, with `initialize_from`; `check` has seen it.
    mesh: That they are laid out on.

  Raises:
    ConfigError: no checkpoint is good.
  """
  source = pathlib.Path(config.train.initialize_from)
  experiment = _experiment(source)
  try:
    params, step = restore_params(source, experiment, mesh)
  except UserError as error:
    raise ConfigError(f'{_FIELD}: {error}') from None
  # The same parameters can be of another function: it is for the user to know.
  changes = differences(to_dict(experiment.model), to_dict(config.model), 'model')
  return params, [
    f'params   of step {step} of {source}',
    *(f'changed  {change}' for change in changes),
  ]


def _experiment(source: pathlib.Path) -> ExperimentConfig:
  try:
    return read_config(source)
  except UserError as error:
    raise ConfigError(f'{_FIELD}: {error}') from None


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each parameter of a model by its path."""
  params = jax.eval_shape(functools.partial(lm.boxed_params, config), jax.random.key(0))
  return {
    lora.path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(nn.unbox(params))
  }
