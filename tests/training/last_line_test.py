"""A process that is killed, aborted or cut off leaves one line; one that comes to its end none."""

import subprocess
import sys

import jax
import pytest

from ssm_moe.training import distributed
from tests.training.distributed_test import ROOT

# The handler that is registered first runs last, as JAX's does.
SCRIPT = """
import atexit, os, signal, sys
{first}
from ssm_moe.training import last_line
last_line.leave("'a' and $HOME")
{then}
"""


@pytest.mark.parametrize(
  ('first', 'then', 'status', 'says'),
  [
    ('', 'os.kill(os.getpid(), signal.SIGKILL)', -9, True),
    ('', 'os.abort()', -6, True),
    # Ctrl-C goes to all processes of a group.
    ('', 'os.killpg(0, signal.SIGINT); os.kill(os.getpid(), signal.SIGKILL)', -9, True),
    ('', '', 0, False),
    ('', 'sys.exit(2)', 2, False),
    ('', 'raise OSError', 1, False),
    ('atexit.register(os.abort)', '', -6, False),
  ],
)
def test_who_has_the_last_line(first, then, status, says):
  ignore = 'signal.signal(signal.SIGINT, signal.SIG_IGN)' if 'SIGINT' in then else ''
  result = subprocess.run(
    [sys.executable, '-c', SCRIPT.format(first=first, then=f'{ignore}\n{then}')],
    cwd=ROOT,
    capture_output=True,
    text=True,
    start_new_session=True,
    timeout=60,
  )
  assert (result.returncode, result.stdout) == (status, '')
  assert result.stderr.splitlines().count("'a' and $HOME") == says


def test_a_connection_that_breaks_is_one_line(monkeypatch):
  def broken(_):
    raise ValueError('UNKNOWN: AllGather failed: closed by peer\nand a stack')

  monkeypatch.setattr(distributed.multihost_utils, 'process_allgather', broken)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  expected = r'^UNKNOWN: AllGather failed: closed by peer; if another process is gone, the same .*$'
  with pytest.raises(distributed.LostProcessError, match=expected), distributed.agreed():
    pass
