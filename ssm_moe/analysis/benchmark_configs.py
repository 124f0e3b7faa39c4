"""Configs by name on a command line that has several of them."""

import ast
import dataclasses
import pathlib
import runpy
from collections.abc import Iterable

import ml_collections

from ssm_moe import config
from ssm_moe.config import ExperimentConfig
from ssm_moe.errors import UserError


def load(flag: str, name: str, overrides: Iterable[str], *, rows: pathlib.Path) -> ExperimentConfig:
  """Returns the config `name`.

  Args:
    flag: That the name was given with, for messages.
    name: A row of the file `rows`, or FILE.py, or FILE.py:ROW.
    overrides: Each FIELD=VALUE, the value as Python writes it, or as it is.
    rows: Where a name alone is looked up.

  Raises:
    UserError: there is no such file, row or field, or the value is of another type.
  """
  file, _, row = name.partition(':')
  if not file.endswith('.py'):
    file, row = str(rows), name
  if not pathlib.Path(file).is_file():
    raise UserError(f'--{flag}={name}: there is no such file')
  try:
    get_config = runpy.run_path(file)['get_config']
    values = get_config(row) if row else get_config()
  except Exception as error:  # whatever a file of the user's raises
    kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
    raise UserError(f'--{flag}={name}: {kind}{" ".join(str(error).split())}') from error
  if not isinstance(values, ml_collections.ConfigDict):
    raise UserError(
      f'--{flag}={name}: get_config returns {type(values).__name__}; it must return a ConfigDict'
    )
  for override in overrides:
    field, equals, text = override.partition('=')
    if not equals:
      raise UserError(f'--set={override}: it must be FIELD=VALUE')
    config.check_key(f'config.{field}', field)
    try:
      value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
      value = text
    config.check_value(f'config.{field}', value)
    values.update_from_flattened_dict({field: value})
  return config.from_config_dict(values)


def shape_of(experiment: ExperimentConfig) -> str:
  """Returns the sizes of a model, its batch and its mesh, for people."""
  model, train = experiment.model, experiment.train
  sizes = dataclasses.asdict(experiment.mesh)
  return ', '.join(
    [
      f'{model.num_periods} x ({model.pattern}), M {model.d_model}, V {model.vocab_size}',
      f'B {train.batch_size}, L {train.sequence_length}',
      *(f'{axis} {size}' for axis, size in sizes.items() if size is not None and size > 1),
    ]
  )
