"""Between dataclasses and what users write: config files, flags, JSON."""

import dataclasses
import json
import pathlib
import types
import typing
from typing import Any, TypeVar

from ml_collections import config_dict

from ssm_moe.config.checks import ConfigError, as_kind
from ssm_moe.config.experiment import ExperimentConfig
from ssm_moe.errors import UserError

_Dataclass = TypeVar('_Dataclass')


def defaults(cls: type = ExperimentConfig) -> config_dict.ConfigDict:
  """Returns every field of `cls` at its default, for a config file to change."""
  return to_config_dict(cls())


def to_config_dict(config: Any) -> config_dict.ConfigDict:
  """Returns every field of a dataclass, for a config file to change."""
  values = config_dict.ConfigDict()
  for field in dataclasses.fields(config):
    kind, value = field.type, getattr(config, field.name)
    if dataclasses.is_dataclass(kind):
      values[field.name] = to_config_dict(value)
    elif isinstance(kind, types.UnionType):
      scalar = typing.get_args(kind)[0]
      values[field.name] = config_dict.placeholder(scalar)
      if value is not None:
        values[field.name] = value
    else:
      values[field.name] = value
  return values


def from_config_dict(
  values: config_dict.ConfigDict | dict[str, Any],
  cls: type[_Dataclass] = ExperimentConfig,
  path: str = 'config',
) -> _Dataclass:
  """Builds the dataclass `cls` from nested mappings.

  Args:
    values: May leave fields out; they take their defaults.
    cls: The dataclass to build.
    path: Dotted name of `values` in the whole config, for messages.

  Raises:
    ConfigError: an unknown key, a value of the wrong type or a contradiction; one line that names
      the key and what is allowed.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for name in values:
    check_key(f'{path}.{name}', name, cls)
  converted = {
    name: _convert(value, fields[name].type, f'{path}.{name}') for name, value in values.items()
  }
  try:
    return cls(**converted)
  except ConfigError as error:
    raise ConfigError(f'{path}.{error}') from None


def from_json(file: pathlib.Path) -> ExperimentConfig:
  """Reads a config.json, as the folder of a run holds it.

  Raises:
    UserError: it is missing or cannot be understood.
  """
  try:
    values = json.loads(file.read_bytes())
  except FileNotFoundError:
    raise UserError(f'{file}: there is no such file') from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{file}: {error}') from None
  if not isinstance(values, dict):
    raise UserError(f'{file}: holds no config')
  return from_config_dict(values, path=f'{file}: config')


def check_key(path: str, rest: str, cls: type = ExperimentConfig) -> Any:
  """Checks that the dotted name `rest` is a field below `cls`, and returns the field's type.

  Args:
    path: The whole name, for the message.
    rest: The part of it that is below `cls`.

  Raises:
    ConfigError: it is not; names the fields there are.
  """
  name, _, deeper = rest.partition('.')
  kinds = {field.name: field.type for field in dataclasses.fields(cls)}
  if name not in kinds:
    raise ConfigError(f'{path} does not exist; below {cls.__name__} there are: {", ".join(kinds)}')
  if not deeper:
    return kinds[name]
  if not dataclasses.is_dataclass(kinds[name]):
    raise ConfigError(f'{path} does not exist; {name} has no fields')
  return check_key(path, deeper, kinds[name])


def check_value(path: str, value: Any) -> None:
  """Checks that `value` is of the type of the field that `path`, config.NAME.NAME, names.

  Raises:
    ConfigError: it is not, or there is no such field.
  """
  _convert(value, check_key(path, path.partition('.')[2]), path)


def from_flag(values: config_dict.ConfigDict | None) -> ExperimentConfig:
  """Builds the experiment that `--config=FILE` and its overrides describe.

  Raises:
    ConfigError: no file was given, or as `from_config_dict`.
  """
  if values is None:
    raise ConfigError(
      '--config is missing, or its get_config returns nothing; give a file, such as '
      'experiments/configs/quickstart.py'
    )
  return from_config_dict(values)


def _convert(value: Any, kind: Any, path: str) -> Any:
  if dataclasses.is_dataclass(kind):
    if not hasattr(value, 'items'):
      raise ConfigError(f'{path} is {value!r}; it is a group of fields, set one of them')
    return from_config_dict(value, kind, path)
  return as_kind(value, kind, path)


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a dataclass as plain nested dictionaries and lists, as JSON holds them."""
  result = dataclasses.asdict(config)

  def plain(value):
    if isinstance(value, dict):
      return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value

  return plain(result)
