"""The one place where a backend is chosen.

An op has an ordered list of candidates, each a name and a function that says why it cannot run
these arguments, or None. 'auto' takes the first that can and logs the choice once, as --verbosity=1
shows; a name is obeyed or refused, and never falls back to another.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
from absl import logging

from ssm_moe.errors import UserError

Supports = Callable[[], str | None]

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)
_DEVICES: contextvars.ContextVar[int | None] = contextvars.ContextVar('devices', default=None)


class UnavailableError(UserError, NotImplementedError):
  """An implementation was named that cannot run what it was given, where it was to run."""


def platform() -> str:
  """Returns what the code that is being traced will run on: 'cpu', 'gpu' or 'tpu'."""
  return _PLATFORM.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
  """Implementations are chosen for the platform `target` meanwhile, whatever this machine has.

  A function that was jitted and traced before keeps its choice: make a new one inside.
  """
  token = _PLATFORM.set(target)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


@contextlib.contextmanager
def on_devices(number: int) -> Iterator[None]:
  """The code that is traced meanwhile is a program for so many devices.

  `jax.jit` learns of layouts after the trace, too late to choose an implementation: whoever knows
  the mesh says so inside the traced function.
  """
  token = _DEVICES.set(number)
  try:
    yield
  finally:
    _DEVICES.reset(token)


def on_one_device() -> bool:
  """Returns whether the arrays that are being traced are known to lie whole on one device.

  They do inside `jax.shard_map` over all axes of its mesh; in a program for one device, as
  `on_devices` or the ambient mesh of `jax.set_mesh` tells; and where there is but one.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.manual_axes:  # some axes alone do not do: the others are split by the compiler
    return set(mesh.manual_axes) == set(mesh.axis_names)
  number = _DEVICES.get()
  if number is None and not mesh.empty:
    number = mesh.size
  if number is None and platform() == jax.default_backend():
    number = jax.device_count()
  return number == 1


def select(op: str, implementation: str, candidates: Mapping[str, Supports]) -> str:
  """Returns the name of the implementation to run.

  Args:
    op: Name of the op, for messages.
    implementation: 'auto' or a key of `candidates`.
    candidates: In order of preference; each value returns why it cannot run, or None.

  Raises:
    UnavailableError: the named implementation cannot run; the message says which and why.
    ValueError: there is no implementation of that name.
  """
  if implementation != 'auto':
    if implementation not in candidates:
      names = ', '.join(candidates)
      raise ValueError(f'{op} has no implementation {implementation!r}; there are: auto, {names}')
    reason = candidates[implementation]()
    if reason is not None:
      raise UnavailableError(f'{op} cannot run {implementation!r} here: {reason}')
    return implementation
  reasons = {}
  for name, supports in candidates.items():
    reason = supports()
    if reason is None:
      _log_choice(op, name, tuple(reasons.items()))
      return name
    reasons[name] = reason
  raise NotImplementedError(f'{op} has nothing to run here: {reasons}')


@functools.cache  # logs each choice once
def _log_choice(op: str, name: str, passed_over: tuple[tuple[str, str], ...]) -> None:
  reasons = ''.join(f'; not {other}: {reason}' for other, reason in passed_over)
  logging.debug('%s runs %s%s', op, name, reasons)


def always() -> None:
  """Supports everything."""
