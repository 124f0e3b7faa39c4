"""The script times whole training steps, of models that may be made small."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import config_files

ROOT = pathlib.Path(__file__).parents[2]
_SMALL = {
  'model.num_periods': 1,
  'model.d_model': 16,
  'model.vocab_size': 31,
  'model.dtype': 'float32',
  'mesh.data': 1,
  'train.batch_size': 2,
  'train.sequence_length': 16,
}


def _run(*arguments):
  return subprocess.run(
    [sys.executable, 'experiments/benchmark_model.py', *arguments],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.extended
def test_times_a_small_model():
  result = _run(
    '--models=mamba_rom',
    *(f'--set={field}={value}' for field, value in _SMALL.items()),
    '--set=model.mamba.scan_implementation=reference',
    '--repeats=1',
    '--warmup=1',
    '--nocheck',
  )
  assert result.returncode == 0, result.stderr
  assert '1 x (M), M 16, V 31, B 2, L 16  float32  ssm_moe' in result.stdout
  assert 'unchecked' in result.stdout and 'mfu_peak_tflops 989.0' in result.stdout


@pytest.mark.slow
def test_times_checks_and_profiles_small_models(tmp_path):
  result = _run(
    '--models=mamba_rom,rom',
    *(f'--set={field}={value}' for field, value in _SMALL.items()),
    '--repeats=2',
    '--warmup=1',
    f'--output={tmp_path}/model.json',
    f'--profile={tmp_path}/profile',
  )
  assert result.returncode == 0, result.stderr
  dense, sparse = json.loads((tmp_path / 'model.json').read_text())
  assert dense['name'] == 'mamba_rom' and dense['pass'] == 'train_step'
  assert dense['shape'] == '1 x (M), M 16, V 31, B 2, L 16'
  for record in (dense, sparse):
    assert 0 < record['min_ms'] <= record['median_ms'] <= record['max_ms']
    assert record['tokens_per_second'] == pytest.approx(32e3 / record['median_ms'])
    assert record['relative_error'] < 1e-4
    assert record['peak_bytes'] > record['temp_bytes'] > 0
    profile = json.loads((tmp_path / 'profile' / f'{record["name"]}.json').read_text())
    assert sum(profile['by_class'].values()) == pytest.approx(profile['milliseconds'])
    assert {'cross entropy', 'scan', 'matmul', 'conv', 'norm', 'optimizer'} <= set(
      profile['by_class']
    )
    with gzip.open(tmp_path / 'profile' / f'{record["name"]}.hlo.gz', 'rt') as file:
      assert file.readline().startswith('HloModule')
  assert dense['fullest_expert'] is None and sparse['fullest_expert'] >= 1
  assert sparse['over_dense'] == sparse['median_ms'] / dense['median_ms']
  assert f'rom takes {sparse["over_dense"]:.3f} times as long as mamba_rom' in result.stdout


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('--models=mamba_131m',), "--models=mamba_131m: there is no row 'mamba_131m'; there are: mam"),
    (('--models=none.py',), '--models=none.py: there is no such file'),
    (('--set=model.d_mdel=3',), 'config.model.d_mdel does not exist'),
    (('--set=model.d_model=wide',), 'config.model.d_model'),
    (('--set=model.d_model',), '--set=model.d_model: it must be FIELD=VALUE'),
  ],
)
def test_a_mistake_is_one_line(arguments, message):
  result = _run(*arguments)
  assert (result.returncode, result.stdout) == (2, '')
  (line,) = result.stderr.splitlines()
  assert line.startswith(f'benchmark_model.py: {message}')


def test_sparse_models_stand_beside_dense_ones_of_the_same_active_size():
  from ssm_moe.models import accounting

  for sparse, dense in (('rom', 'mamba_rom'), ('moe_mamba', 'mamba_512')):
    sizes = [
      accounting.account(config_files.load(f'benchmark:{name}').model, 1024)[
        'active_non_embedding_params'
      ]
      for name in (sparse, dense)
    ]
    assert max(sizes) < 1.06 * min(sizes), (sparse, sizes)
