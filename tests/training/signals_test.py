"""Signals become a flag inside the block only; the second Ctrl-C interrupts."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from ssm_moe.training.signals import StopSignals


def send(number):
  os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _restored():
  """Whatever a test does, the handlers of pytest come back."""
  former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  yield
  for number, handler in former.items():
    signal.signal(number, handler)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_the_former_handler_comes_back(number):
  received = []
  signal.signal(number, lambda *_: received.append(number))
  with StopSignals() as stop:
    assert stop.requested is None
    send(number)
    assert stop.requested == number.name
  assert received == []
  send(number)
  assert received == [number]


def test_a_second_interrupt_raises():
  with StopSignals() as stop:
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)
    assert stop.requested == 'SIGTERM'


def test_handlers_come_back_after_an_error():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(RuntimeError), StopSignals():
    raise RuntimeError
  assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_the_handlers_alone(caplog):
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def body():
    with StopSignals() as stop:
      seen.extend([signal.getsignal(signal.SIGTERM), stop.requested])

  thread = threading.Thread(target=body)
  thread.start()
  thread.join()
  assert seen == [before, None]
  assert 'main thread' in caplog.text


def test_a_real_sigterm_lets_a_loop_finish():
  program = (
    'import time\n'
    'from ssm_moe.training.signals import StopSignals\n'
    'with StopSignals() as stop:\n'
    '  print("ready", flush=True)\n'
    '  while not stop.requested: time.sleep(0.01)\n'
    'print("stopped by", stop.requested)\n'
  )
  child = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True)
  assert child.stdout.readline() == 'ready\n'
  child.send_signal(signal.SIGTERM)
  output, _ = child.communicate(timeout=20)
  assert (child.returncode, output) == (0, 'stopped by SIGTERM\n')
