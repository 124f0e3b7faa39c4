"""The error of a config, and the checks that raise it."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from ssm_moe.errors import UserError

_INT_LIMIT = 2**63


class ConfigError(UserError):
  """A key that does not exist, a value of the wrong type, or two values that contradict."""


class Checked:
  """Base of every config dataclass: each field's value is of the field's type when it is built.

  An integer serves as float, and a list as tuple.

  Raises:
    ConfigError: a value is not, a float is not finite, or an integer takes more than 64 bits; the
      message names the field.
  """

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = as_kind(getattr(self, field.name), field.type, field.name)
      object.__setattr__(self, field.name, value)  # the dataclasses are frozen


def as_kind(value: Any, kind: Any, name: str) -> Any:
  """Returns a value as the type that annotates its field.

  Args:
    value: Of the field.
    kind: The annotation; anything that a config dataclass uses.
    name: Of the field, for the message.

  Raises:
    ConfigError: it is of another type, not finite, or too large.
  """
  if isinstance(kind, types.UnionType):
    return None if value is None else as_kind(value, typing.get_args(kind)[0], name)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is Literal:
    # A NumPy dtype, for one, is equal to its name.
    if not isinstance(value, str) or value not in arguments:
      raise ConfigError(f'{name} is {value!r}; it must be one of {", ".join(arguments)}')
    return value
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f'{name} is {value!r}; it must be a tuple')
    return tuple(as_kind(item, arguments[0], f'{name}[{i}]') for i, item in enumerate(value))
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value) if abs(value) < _INT_LIMIT else math.inf
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise ConfigError(f'{name} is {value!r}; it must be of type {kind.__name__}')
  if kind is float and not math.isfinite(value):
    raise ConfigError(f'{name} is {value}; it must be finite')
  if kind is int and abs(value) >= _INT_LIMIT:
    raise ConfigError(f'{name} is {value}; it must fit in 64 bits')
  return value


def check(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def check_positive(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    check(value is None or value > 0, f'{name} is {value}; it must be positive')


def check_fraction(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    check(0 <= value <= 1, f'{name} is {value}; it must be between 0 and 1')


def check_not_negative(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    check(value >= 0, f'{name} is {value}; it must not be negative')
