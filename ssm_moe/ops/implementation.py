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

Supports = Callable[[], str | None]

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


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


def select(op: str, implementation: str, candidates: Mapping[str, Supports]) -> str:
  """Returns the name of the implementation to run.

  Args:
    op: Name of the op, for messages.
    implementation: 'auto' or a key of `candidates`.
    candidates: In order of preference; each value returns why it cannot run, or None.

  Raises:
    NotImplementedError: the named implementation cannot run; the message says which and why.
    ValueError: there is no implementation of that name.
  """
  if implementation != 'auto':
    if implementation not in candidates:
      names = ', '.join(candidates)
      raise ValueError(f'{op} has no implementation {implementation!r}; there are: auto, {names}')
    reason = candidates[implementation]()
    if reason is not None:
      raise NotImplementedError(f'{op} cannot run {implementation!r} here: {reason}')
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
