"""The script compiles for a slice without one, and answers mistakes in one line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import tpu

ROOT = pathlib.Path(__file__).parents[2]
_CONFIGS = 'experiments/configs'
# The smallest model, and the shortest scan.
_SMALL = (f'--config={_CONFIGS}/quickstart.py:mamba', '--config.train.sequence_length=32')

pytestmark = list(tpu.MARKS)


def _run(*arguments):
  return subprocess.run(
    [sys.executable, 'experiments/compile_ahead.py', *arguments],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
  )


@pytest.mark.slow
def test_a_model_that_fits_is_described():
  result = _run(*_SMALL, '--topology=v5e:1x1', '--decode_batch=2')
  assert (result.returncode, result.stderr) == (0, '')
  (line,) = result.stdout.splitlines()
  report = json.loads(line)
  assert set(report) == {
    'topology',
    'fits',
    'bytes_per_device',
    'chip_bytes',
    'flops_closed_form',
    'flops_compiled',
    'collectives',
    'estimated_step_seconds',
    'estimated_mfu',
    'detail',
    'decode',
  }
  assert (report['topology'], report['fits']) == ('v5e:1x1', True)
  compiled = report['detail']['bytes_compiled']
  assert report['bytes_per_device'] == compiled['peak'] + compiled['code']
  assert report['bytes_per_device'] > compiled['arguments']
  assert 0 < report['bytes_per_device'] < report['chip_bytes'] == 2**34
  assert report['collectives'] == {}
  # The closed form has the scan and the convolution too, which are elementwise work: 8 * 256 * 16 +
  # 2 * 256 * 4 operations of each of 4 layers, three times over.
  elementwise = 3 * 4 * (8 * 256 * 16 + 2 * 256 * 4) * 8 * 32
  assert report['flops_compiled'] == pytest.approx(
    report['flops_closed_form'] - elementwise, rel=0.02
  )
  assert 0 < report['estimated_mfu'] < 1
  assert report['decode']['batch'] == 2
  assert report['decode']['fits']
  assert report['decode']['bytes_per_device'] < report['bytes_per_device']


@pytest.mark.slow
def test_what_does_not_fit_says_so_and_what_would():
  result = _run(*_SMALL, '--topology=v5e:1x1', '--config.train.batch_size=131072')
  assert result.returncode == 3
  (line,) = result.stderr.splitlines()
  assert 'does not fit: it takes about' in line
  assert '--config.model.remat=period' in line
  report = json.loads(result.stdout.splitlines()[-1])
  assert not report['fits']
  assert report['bytes_per_device'] > report['chip_bytes']
  assert report['flops_closed_form'] > 0
  for name in ('flops_compiled', 'collectives', 'estimated_step_seconds', 'estimated_mfu'):
    assert report[name] is None


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ((), '--topology is missing'),
    (('--topology=v5e:2x2', '--config.mesh.fsdp=3'), 'the number of devices, 4'),
    (('--topology=v5e:2x2', '--config.train.batch_size=6'), 'a multiple of the 4 devices'),
    (
      ('--topology=v5e:2x2', '--decode_batch=6'),
      'is 6; it must be a positive multiple',
    ),
  ],
)
def test_a_mistake_is_one_line(arguments, words):
  result = _run(*_SMALL, *arguments)
  assert (result.returncode, result.stdout) == (2, '')
  (line,) = result.stderr.splitlines()
  assert line.startswith('compile_ahead.py: ')
  assert words in line
