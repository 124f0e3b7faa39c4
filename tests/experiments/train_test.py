"""The script: what a shell sees of it, and a life with kill -9 and SIGTERM in it."""

import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import chex
import pytest

from ssm_moe.config import from_config_dict
from tests.training import small_run

ROOT = pathlib.Path(__file__).parents[2]

CONFIG = """
from ssm_moe import config as config_lib

def get_config():
  config = config_lib.defaults()
  config.model.update(d_model=8, num_periods=2)
  config.model.mamba.d_state = 4
  config.data.update(train=({train!r},), valid=({valid!r},))
  config.optimizer.update(schedule='constant', warmup_fraction=0.0)
  config.train.update(
    num_steps=100_000, batch_size=8, sequence_length=16, log_every=1, eval_every=200,
    checkpoint_every=25,
  )
  config.sample.num_tokens = 0
  return config
"""


def _environment():
  # XLA_FLAGS and the cache of compiled code are those of the process of the tests.
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(ROOT / '.jax_cache')
  return os.environ | {
    'PYTHONPATH': str(ROOT),
    'PYTHONDONTWRITEBYTECODE': '1',
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
  }


def _start(folder, *arguments, **environment):
  return subprocess.Popen(
    [sys.executable, str(ROOT / 'experiments' / 'train.py'), *arguments],
    cwd=folder,
    env=_environment() | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process):
  """Waits for the end; returns exit status, standard output and standard error."""
  try:
    output, errors = process.communicate(timeout=120)
  finally:
    process.kill()
  return process.returncode, output, errors


def _wait_for(process, condition):
  until = time.monotonic() + 120
  while not condition():
    if process.poll() is not None or time.monotonic() > until:
      process.kill()
      raise AssertionError(process.communicate()[1])
    time.sleep(0.005)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a config file and text; evaluation takes a good part of a second."""
  folder = tmp_path_factory.mktemp('train')
  train = small_run.write_text(folder)
  valid = folder / 'valid.txt'
  valid.write_text('the cabbage is bad. ' * 2500)
  (folder / 'small.py').write_text(CONFIG.format(train=train, valid=str(valid)))
  return folder


def _last_step(workdir):
  path = workdir / 'metrics.jsonl'
  text = path.read_bytes() if path.exists() else b''
  lines = text[: text.rfind(b'\n') + 1].splitlines()  # the last line may be half written
  return json.loads(lines[-1])['step'] if lines else 0


@pytest.mark.slow
def test_a_life_with_kills_and_signals_equals_one_without(folder):
  command = ['--config=small.py', '--workdir=life']
  workdir = folder / 'life'

  process = _start(folder, *command)
  _wait_for(process, (workdir / 'checkpoints' / '00000025').exists)
  process.send_signal(signal.SIGKILL)
  assert _finish(process)[0] == -signal.SIGKILL
  killed_after = _last_step(workdir)

  # The second life begins at a checkpoint at most 25 steps back, and is stopped in training.
  process = _start(folder, *command)
  _wait_for(process, lambda: _last_step(workdir) >= killed_after + 20)
  process.send_signal(signal.SIGTERM)
  status, output, errors = _finish(process)
  assert (status, output) == (0, ''), errors
  stopped_at = max(small_run.steps(workdir))
  message = errors.splitlines()[-1]
  assert message.startswith(f'SIGTERM: step {stopped_at} is saved in life; ')
  assert small_run.rows(workdir)[-1]['step'] == stopped_at

  # The third is stopped in the evaluation of step 200, whose row of training comes just before.
  process = _start(folder, *command)
  _wait_for(process, lambda: _last_step(workdir) >= 200)
  process.send_signal(signal.SIGTERM)
  status, output, errors = _finish(process)
  assert (status, output) == (0, ''), errors
  assert errors.splitlines()[-1].startswith('SIGTERM: step 200 is saved in life; ')
  assert max(small_run.steps(workdir)) == 200
  assert 'valid_loss' not in small_run.rows(workdir)[-1]

  process = _start(folder, *command, '--config.train.num_steps=210')
  status, output, errors = _finish(process)
  assert status == 0, errors
  summary = json.loads(output.splitlines()[-1])
  assert summary['final_step'] == 210

  values = runpy.run_path(str(folder / 'small.py'))['get_config']()
  values.train.num_steps = 210
  config = from_config_dict(values)
  expected = small_run.run(config, folder / 'whole')
  state, metadata = small_run.arrays(config, workdir)
  expected_state, expected_metadata = small_run.arrays(config, folder / 'whole')
  chex.assert_trees_all_equal(state, expected_state)  # exact: no tolerance
  assert metadata == expected_metadata
  assert small_run.rows(workdir) == small_run.rows(folder / 'whole')
  for key in ('train_loss', 'valid_loss', 'valid_bits_per_byte'):
    assert summary[key] == expected[key]


def test_the_quickstart_trains(tmp_path):
  # Shortened, on its own data. The terminal knows no UTF-8: what a model writes may not break it.
  process = _start(
    tmp_path,
    f'--config={ROOT}/experiments/configs/quickstart.py',
    '--config.train.num_steps=3',
    '--config.train.batch_size=2',
    '--config.train.sequence_length=32',
    '--config.train.eval_tokens=2000',
    '--config.train.log_every=1',
    '--config.model.d_model=8',
    '--config.model.num_periods=2',
    '--config.sample.num_tokens=8',
    PYTHONIOENCODING='ascii',
  )
  status, output, errors = _finish(process)
  assert status == 0, errors
  workdir = tmp_path / 'runs' / 'quickstart'
  summary = json.loads(output.splitlines()[-1])
  assert list(summary) == [
    'final_step',
    'train_loss',
    'valid_loss',
    'valid_bits_per_byte',
    'tokens_per_second',
    'workdir',
  ]
  assert summary['final_step'] == 3 and summary['workdir'] == 'runs/quickstart'
  assert 4 < summary['valid_loss'] < 7 and summary['valid_bits_per_byte'] > 4
  assert output.startswith('def ')  # the sample continues its prompt
  assert {path.name for path in workdir.iterdir()} == {
    'checkpoints',
    'config.json',
    'expert_load.png',
    'loss.png',
    'metrics.jsonl',
    'tensorboard',
    'tokens',
  }
  trained = [row for row in small_run.rows(workdir) if 'train_loss' in row]
  assert [row['step'] for row in trained] == [1, 2, 3]
  for part in ('parameters', 'active', 'FLOPs per token', '1 x cpu', 'step 3: valid loss'):
    assert part in errors, part


def test_a_mistake_has_status_2_and_touches_nothing(folder):
  before = small_run.snapshot(folder)
  status, output, errors = _finish(
    _start(folder, '--config=small.py', "--config.data.valid=('x',)")
  )
  assert (status, output) == (2, '')
  (line,) = errors.splitlines()
  assert line.startswith('train.py: config.data.valid: x: no such file')
  assert small_run.snapshot(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'match'),
  [
    (['--profile_steps=10:x'], 'it must be START:STOP, two numbers'),
    (['--num_processes=2', '--process_id=0'], '--coordinator_address must be given too'),
    (['--num_processes=two'], '--num_processes=two'),
    # No cluster is known where nothing says so, and the metadata server is not asked.
    (['--distributed'], 'give --coordinator_address, --num_processes and --process_id'),
  ],
)
def test_a_flag_that_cannot_be_meant_is_one_line(folder, flags, match):
  before = small_run.snapshot(folder)
  process = _start(folder, '--config=small.py', *flags, TPU_SKIP_MDS_QUERY='1')
  status, output, errors = _finish(process)
  assert (status, output) == (2, '')
  (line,) = errors.splitlines()
  assert match in line
  assert small_run.snapshot(folder) == before


LOADING = """
import time
from ssm_moe import command_line

def main():
  with command_line.loading():
    print('loading', flush=True)
    try:
      time.sleep(60)
    except BaseException:  # as native modules do
      pass

command_line.run(main)
"""


@pytest.mark.parametrize(
  ('number', 'status', 'line'),
  [(signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'terminated')],
)
def test_a_signal_while_modules_are_loaded_is_one_line(tmp_path, number, status, line):
  (tmp_path / 'script.py').write_text(LOADING)
  process = subprocess.Popen(
    [sys.executable, 'script.py'],
    cwd=tmp_path,
    env=_environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'loading\n'
  process.send_signal(number)
  assert _finish(process) == (status, '', f'script.py: {line}\n')


def test_no_large_module_is_loaded_before_main():
  program = (
    'import runpy, sys\n'
    f'runpy.run_path({str(ROOT / "experiments" / "train.py")!r}, run_name="not main")\n'
    'print([name for name in ("jax", "flax", "orbax", "grain", "numpy") if name in sys.modules])\n'
  )
  output = subprocess.run(
    [sys.executable, '-c', program], env=_environment(), capture_output=True, text=True, check=True
  )
  assert output.stdout == '[]\n'


@pytest.mark.slow
def test_a_failure_has_status_1(folder):
  absurd = '--config.optimizer.peak_learning_rate=1e30'
  status, output, errors = _finish(_start(folder, '--config=small.py', '--workdir=failed', absurd))
  assert (status, output) == (1, '')
  message = errors.splitlines()[-1]
  assert message.startswith('train.py: step ') and 'the loss is nan' in message
  assert 'Traceback' not in errors
