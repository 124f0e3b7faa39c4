"""The script: a table and a JSON object, for sizes that compile quickly."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import tpu

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [*tpu.MARKS, pytest.mark.slow]


def run_script(*arguments):
  return subprocess.run(
    [sys.executable, str(ROOT / 'experiments' / 'estimate_scan.py'), *arguments],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_every_implementation_is_estimated():
  result = run_script('--length=256', '--d_inner=128', '--d_state=8')
  assert result.returncode == 0, result.stderr
  *table, last = result.stdout.splitlines()
  rows = json.loads(last)['rows']
  assert len(table) == 3 + len(rows) == 9
  by_name = {(row['implementation'], row['pass']): row for row in rows}
  for name in ('chunked', 'associative', 'pallas_tpu'):
    forward, both = (by_name[name, kind] for kind in ('forward', 'forward_backward'))
    # x, dt, z and y in bfloat16 at the least.
    assert forward['hbm_bytes'] >= 4 * 2 * 256 * 128 and both['hbm_bytes'] > forward['hbm_bytes']
    assert both['vector_operations'] > forward['vector_operations'] > 6 * 256 * 128 * 8
    assert both['bound_seconds'] == max(both['seconds'].values())


def test_a_mistake_is_one_line():
  result = run_script('--length=1')
  assert (result.returncode, result.stderr) == (
    2,
    'estimate_scan.py: --length=1: it must be at least 2\n',
  )
