"""The script prints the account of a config, with its overrides, as one JSON object."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments):
  return subprocess.run(
    [sys.executable, 'experiments/account.py', *arguments],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_prints_parameters_and_flops():
  result = _run('--config=experiments/configs/rom_115m.py')
  assert (result.returncode, result.stderr) == (0, '')
  account = json.loads(result.stdout)
  components = account.pop('components')
  assert set(account) == {
    'total_params',
    'active_params',
    'non_embedding_params',
    'active_non_embedding_params',
    'flops_per_token_forward',
    'flops_per_token_train',
  }
  # The counts of the paper's smallest model.
  assert account['total_params'] == 709_786_368
  assert account['active_params'] == 115_243_776
  for key, whole in (
    ('total_params', 'total_params'),
    ('active_params', 'active_params'),
    ('flops_per_token', 'flops_per_token_forward'),
  ):
    assert sum(component[key] for component in components.values()) == account[whole]
  assert account['flops_per_token_train'] == 3 * account['flops_per_token_forward']
  embedding = 32_000 * 768  # tied
  assert account['non_embedding_params'] == account['total_params'] - embedding
  assert account['active_non_embedding_params'] == account['active_params'] - embedding


def test_overrides_count():
  dense = _run(
    '--config=experiments/configs/rom_115m.py', '--config.model.mamba.rom.kind=none'
  ).stdout
  assert json.loads(dense)['total_params'] == 115_096_320


def test_a_mistake_is_one_line():
  result = _run('--config=experiments/configs/rom_115m.py', '--config.model.num_layers=3')
  assert (result.returncode, result.stdout) == (2, '')
  (line,) = result.stderr.splitlines()
  assert line.startswith('account.py: config.model.num_layers does not exist')
  assert 'num_periods' in line


def test_the_layout_on_a_mesh_of_the_config():
  result = _run('--config=experiments/configs/quickstart.py', '--config.mesh.fsdp=2', '--layout')
  assert (result.returncode, result.stderr) == (0, '')
  *table, last = result.stdout.splitlines()
  (line,) = (line for line in table if line.startswith('  embedding'))
  assert ' '.join(line.split()) == 'embedding 257 x 128 float32 vocab, embed -, fsdp 65,792'
  totals = json.loads(last)
  assert totals['mesh'] == {'data': 1, 'fsdp': 2, 'expert': 1, 'tensor': 1, 'sequence': 1}
  kinds = totals['bytes_per_device']
  assert kinds.pop('sum') == sum(kinds.values())
  moments = next(line for line in table if 'are moments' in line)
  # The counts of steps besides.
  assert moments.endswith(f'as their parameters: {kinds["optimizer"] - 8:,} bytes per device.')


def test_a_mesh_that_cannot_be_is_one_line():
  result = _run('--config=experiments/configs/quickstart.py:mamba', '--layout', '--num_devices=0')
  assert (result.returncode, result.stdout) == (2, '')
  assert result.stderr == 'account.py: --num_devices is 0; it must be at least 1\n'


def test_a_reader_that_has_seen_enough_is_no_error():
  command = f'{sys.executable} experiments/account.py --config=experiments/configs/quickstart.py'
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  # `true` reads nothing and is gone long before the script writes.
  result = subprocess.run(
    f'{command} | true', shell=True, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert (result.returncode, result.stderr) == (0, '')
