"""Keeps what Orbax says of its work, and of failures that it also raises, off standard error.

A save logs about 27 lines. One that fails, on a full disk say, logs its error four times with the
traceback; besides, coroutines that it gives up report to the logger of `asyncio`, some of them only
when the interpreter exits, and threads of TensorStore to `sys.unraisablehook`.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def kept_away() -> Iterator[None]:
  """Lets only the warnings of Orbax through: its log for good, and threads while the block runs."""
  # A filter that is there already is not added again.
  logging.getLogger('absl').addFilter(_is_not_of_orbax)
  logging.getLogger('asyncio').addFilter(_is_not_given_up_by_orbax)
  former_hook = sys.unraisablehook

  def hook(unraisable) -> None:
    if unraisable.object is not None or str(unraisable.exc_value) != 'Event loop is closed':
      former_hook(unraisable)

  sys.unraisablehook = hook
  try:
    yield
  finally:
    sys.unraisablehook = former_hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  is_warning = record.levelno == logging.WARNING
  return is_warning or f'{os.sep}orbax{os.sep}' not in record.pathname


def _is_not_given_up_by_orbax(record: logging.LogRecord) -> bool:
  message = record.getMessage()
  return not ('exception was never retrieved' in message and 'orbax' in message)
