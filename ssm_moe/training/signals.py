"""A request to stop, from SIGTERM or Ctrl-C, as a flag that the training loop polls."""

import signal
import threading
from types import FrameType

from absl import logging


class StopSignals:
  """Turns SIGTERM and SIGINT into `requested` while its `with` block runs.

  The first signal only sets the flag, so that a loop can finish its step and save. A second SIGINT
  raises KeyboardInterrupt, for a step that hangs. Leaving the block restores the former handlers.

  Python runs handlers in the main thread only: in another thread this does nothing, and logs so.

  Attributes:
    requested: Name of the first signal that came, or None.
  """

  def __init__(self):
    self.requested: str | None = None
    self._interrupted = False
    self._former: dict[signal.Signals, object] = {}

  def __enter__(self) -> 'StopSignals':
    if threading.current_thread() is not threading.main_thread():
      logging.warning('not in the main thread: SIGTERM and Ctrl-C stop the run without a save')
      return self
    for number in (signal.SIGTERM, signal.SIGINT):
      self._former[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._former.items():
      # None stands for a handler that was not installed from Python; it cannot be put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._former = {}

  def _handle(self, number: int, _: FrameType | None) -> None:
    # No logging here: the signal may have come while the main thread held a lock of it.
    self.requested = self.requested or signal.Signals(number).name
    if number == signal.SIGINT:
      if self._interrupted:
        raise KeyboardInterrupt
      self._interrupted = True
