"""Only what Orbax says twice is kept away; what others say is heard."""

import asyncio
import logging
import sys
import types

from ssm_moe.training import orbax_noise


def test_threads_that_find_their_loop_closed(monkeypatch):
  heard = []
  monkeypatch.setattr(sys, 'unraisablehook', heard.append)
  closed = types.SimpleNamespace(exc_value=RuntimeError('Event loop is closed'), object=None)
  other = types.SimpleNamespace(exc_value=RuntimeError('Something else'), object=None)
  in_a_destructor = types.SimpleNamespace(exc_value=closed.exc_value, object=print)
  with orbax_noise.kept_away():
    for unraisable in (closed, other, in_a_destructor):
      sys.unraisablehook(unraisable)
  sys.unraisablehook(closed)
  assert heard == [other, in_a_destructor, closed]


def test_coroutines_that_were_given_up(caplog):
  loop = asyncio.new_event_loop()
  with orbax_noise.kept_away():
    for message in ('cannot write 1.unfinished/state.orbax-checkpoint-tmp/d', 'mine'):
      future = loop.create_future()
      future.set_exception(ValueError(message))
      del future
  loop.close()
  (record,) = caplog.records
  assert record.name == 'asyncio' and "ValueError('mine')" in record.getMessage()


def test_a_warning_of_orbax_is_heard(caplog):
  with orbax_noise.kept_away():
    for level in (logging.INFO, logging.WARNING, logging.ERROR):
      for file in ('/lib/orbax/checkpoint.py', '/lib/other.py'):
        record = logging.LogRecord('absl', level, file, 1, 'text', (), None)
        logging.getLogger('absl').handle(record)
  heard = [(record.levelname, record.pathname) for record in caplog.records]
  assert ('WARNING', '/lib/orbax/checkpoint.py') in heard
  assert {file for _, file in heard} == {'/lib/orbax/checkpoint.py', '/lib/other.py'}
  assert [level for level, file in heard if 'orbax' in file] == ['WARNING']
  assert 'ERROR' in {level for level, _ in heard}
