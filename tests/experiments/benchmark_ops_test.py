"""The script prints and keeps what it has checked, and the cases for a GPU are right when small."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from ssm_moe.analysis import benchmark, benchmark_layers, benchmark_matmuls, benchmark_scans
from ssm_moe.analysis.benchmark_timing import Timing
from ssm_moe.training.losses import cross_entropy_sum

ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments):
  return subprocess.run(
    [sys.executable, 'experiments/benchmark_ops.py', *arguments],
    cwd=ROOT,
    # Without the flags of the tests, by which XLA compiles fast what runs slowly.
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.slow
def test_times_an_op_on_this_machine(tmp_path):
  result = _run(
    '--filter=selective_scan/(chunked|pallas)', '--repeats=1', f'--output={tmp_path}/ops.json'
  )
  assert result.returncode == 0, result.stderr
  records = json.loads((tmp_path / 'ops.json').read_text())
  assert [(r['implementation'], r['pass']) for r in records] == [
    ('chunked', pass_name) for pass_name in benchmark.PASSES
  ]
  assert 'pallas_tpu is left out: ' in result.stdout and 'checked against' in result.stdout


def test_a_filter_that_fits_nothing_is_one_line():
  result = _run('--filter=fast')
  assert (result.returncode, result.stdout) == (2, '')
  assert 'fits none of: selective_scan/reference B 2' in result.stderr


def test_tuning_without_the_kernels_is_one_line():
  result = _run('--tune=blocks.json')
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert line.startswith('benchmark_ops.py: --tune: the grouped matmul has no kernel here: ')
  assert not (ROOT / 'blocks.json').exists()


SMALL_CASES = {
  'selective_scan': lambda: benchmark_scans.selective_scans('gpu')[0],
  'ssd': lambda: benchmark_scans.ssds()[0],
  'grouped_matmul': lambda: benchmark_matmuls.grouped_matmuls()[0],
  'conv': lambda: benchmark_layers.convolutions()[0],
  'conv_segments': lambda: benchmark_layers.convolutions()[1],
  'norm': lambda: benchmark_layers.norms()[0],
  'cross_entropy': lambda: benchmark_layers.cross_entropies(cross_entropy_sum)[0],
}


@pytest.mark.parametrize('name', SMALL_CASES)
def test_the_cases_for_a_gpu_are_right_when_small(name, monkeypatch):
  monkeypatch.setattr(benchmark_scans, '_SCAN_SIZES', ((2, 33, 16),))
  monkeypatch.setattr(benchmark_scans, '_SSD_SIZES', ((1, 33, 2),))
  monkeypatch.setattr(benchmark_matmuls, 'GROUPED_SIZES', ((96, 32, 64, 4),))
  monkeypatch.setattr(benchmark_layers, '_CONVOLUTION_SIZES', (2, 64, 32))
  monkeypatch.setattr(benchmark_layers, '_NORM_SIZES', ((64, 32),))
  monkeypatch.setattr(benchmark_layers, '_VOCABULARY_SIZES', ((64, 32, 77),))
  op = SMALL_CASES[name]()
  names = [n for n in op.names if n not in ('reference', 'associative')]  # compiled elsewhere
  outcome = benchmark.run(op, names=names, seed=0, timing=Timing(repeats=1))
  assert outcome.failed == []
  assert outcome.records
  assert all(r.relative_error is not None or r.implementation == 'dense' for r in outcome.records)
