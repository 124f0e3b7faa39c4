"""Which parameters a run trains: all, those that patterns choose, or adapters beside them.

What is not trained has no gradient and no moments: the optimizer never sees it. `learnt` is the
tree that it sees, the model's own with None in place of each frozen parameter, or the adapters'.
"""

import fnmatch
from typing import Any

import jax
from flax import linen as nn

from ssm_moe.config import ConfigError, ExperimentConfig, OptimizerConfig
from ssm_moe.models import lm, lora
from ssm_moe.models.block import PeriodAux
from ssm_moe.shapes import PyTree


def learnt(params: PyTree, adapters: PyTree | None, config: ExperimentConfig) -> PyTree:
  """Returns what the optimizer trains.

  Args:
    params: Of the model, in flax boxes or not.
    adapters: If there are any, they alone are trained.
    config: Of the experiment.

  Raises:
    ConfigError: a pattern fits no parameter, or nothing is left to train.
  """
  return _trained(params, config.optimizer) if adapters is None else adapters


def check(config: ExperimentConfig) -> None:
  """Checks patterns and adapters against the model, before anything takes long.

  Raises:
    ConfigError: as `learnt` and `lora.init`.
  """
  if not (config.lora.rank or config.optimizer.train_only or config.optimizer.freeze):
    return

  def choose(key):
    params = lm.boxed_params(config.model, key)
    adapters = lora.init(key, params, config.lora) if config.lora.rank else None
    return nn.unbox(learnt(params, adapters, config))

  jax.eval_shape(choose, jax.random.key(0))


def with_learnt(params: PyTree, learnt: PyTree, config: ExperimentConfig) -> PyTree:
  """Returns the parameters that the model runs with.

  Args:
    params: Of the model, of which the frozen ones are used.
    learnt: As `learnt` gives it.
    config: Of the experiment.
  """
  if config.lora.rank:
    return lora.merged(params, learnt, config.lora)
  return _joined(learnt, params)


def replaced(
  params: PyTree, adapters: PyTree | None, learnt: PyTree
) -> tuple[PyTree, PyTree | None]:
  """Returns parameters and adapters with `learnt` in place of what was trained."""
  if adapters is not None:
    return params, learnt
  return _joined(learnt, params), None


def with_moved_biases(params: PyTree, aux: PeriodAux, config: ExperimentConfig) -> PyTree:
  """Returns the parameters after a step has moved the selection biases that are not frozen."""
  if config.lora.rank:
    return params
  moved = lm.with_moved_biases(params, aux, config.model)
  return _joined(_trained(moved, config.optimizer), params)


def _trained(params: PyTree, config: OptimizerConfig) -> PyTree:
  if not config.train_only and not config.freeze:
    return params
  leaves, tree = jax.tree.flatten_with_path(params, is_leaf=_is_box)
  names = [lora.path_name(path) for path, _ in leaves]
  for field in ('train_only', 'freeze'):
    lora.check_patterns(f'config.optimizer.{field}', getattr(config, field), names, 'parameter')
  trained = [_is_trained(name, config) for name in names]
  if not any(trained):
    raise ConfigError('config.optimizer.freeze leaves no parameter to train')
  return tree.unflatten(leaf if on else None for (_, leaf), on in zip(leaves, trained))


def _is_trained(name: str, config: OptimizerConfig) -> bool:
  def fits(patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

  return (not config.train_only or fits(config.train_only)) and not fits(config.freeze)


def _joined(learnt: PyTree, params: PyTree) -> PyTree:
  return jax.tree.map(
    lambda own, frozen: frozen if own is None else own, learnt, params, is_leaf=lambda x: x is None
  )


def _is_box(leaf: Any) -> bool:
  return isinstance(leaf, nn.Partitioned)
