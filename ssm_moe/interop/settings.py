"""The values of a published model's config.json, each of which somebody must have asked for."""

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from ssm_moe.errors import UserError

_REQUIRED = object()


class Settings:
  """Reads a config.json by key; what is not asked for is an error at the end.

  A key that nobody knows could mean another function of the model.

  Args:
    file: The config.json, for messages.
    values: What it holds.
    group: The key that `values` stands at, where that is not the whole file.
  """

  def __init__(self, file: pathlib.Path, values: dict[str, Any], group: str = ''):
    self._file, self._values, self._group = file, values, group
    self._known: set[str] = set()

  def size(self, key: str, default: Any = _REQUIRED) -> int:
    """Returns a whole number of at least 1."""
    return self._of_kind(key, default, 'a whole number of at least 1', _is_size)

  def number(self, key: str, default: Any = _REQUIRED) -> float:
    """Returns a positive number."""
    return float(self._of_kind(key, default, 'a positive number', _is_positive))

  def flag(self, key: str, default: Any = _REQUIRED) -> bool:
    """Returns true or false."""
    return self._of_kind(key, default, 'true or false', lambda value: isinstance(value, bool))

  def group(self, key: str) -> 'Settings':
    """Returns the settings below a key; none if there is no such key."""
    values = self._of_kind(key, {}, 'an object', lambda value: isinstance(value, dict))
    return Settings(self._file, values, self._name(key))

  def rank(self, key: str) -> int | None:
    """Returns the rank of Mamba's step size; None for "auto"."""
    self._known.add(key)
    return None if self._values.get(key, 'auto') == 'auto' else self.size(key)

  def only(self, key: str, *allowed: Any) -> Any:
    """Returns the value of a key, which must be one of these; the first if there is no such key."""
    value = self._of_kind(key, allowed[0], '', lambda value: True)
    if not any(value == known and type(value) is type(known) for known in allowed):
      self.refuse(key, f'it must be {" or ".join(map(_spelled, allowed))}')
    return value

  def ignore(self, keys: Iterable[str]) -> None:
    """Takes note of keys that have no bearing on the function of the model."""
    self._known |= set(keys)

  def close(self) -> None:
    """Checks that every key has been asked for.

    Raises:
      UserError: names one that was not.
    """
    unknown = [key for key in self._values if key not in self._known]
    if unknown:
      raise UserError(
        f'{self._file}: {self._name(unknown[0])} is a key that ssm_moe does not know; remove it if '
        'the model computes the same without it'
      )

  def refuse(self, key: str, why: str) -> None:
    """Raises a UserError about the value of a key."""
    shown = _spelled(self._values[key]) if key in self._values else 'absent'
    raise UserError(f'{self._file}: {self._name(key)} is {shown}; {why}')

  def _of_kind(self, key: str, default: Any, expected: str, is_kind: Any) -> Any:
    self._known.add(key)
    if key not in self._values and default is not _REQUIRED:
      return default
    if key not in self._values or not is_kind(self._values[key]):
      self.refuse(key, f'it must be {expected}')
    return self._values[key]

  def _name(self, key: str) -> str:
    return f'{self._group}.{key}' if self._group else key


def _is_positive(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _spelled(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
