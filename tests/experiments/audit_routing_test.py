"""The script: a record, its replay, wrong routes, and mistakes answered with one line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from ssm_moe.config import (
  DataConfig,
  ExperimentConfig,
  MambaConfig,
  ModelConfig,
  RoMConfig,
  SampleConfig,
  TrainConfig,
)
from tests.training import small_run

ROOT = pathlib.Path(__file__).parents[2]
LAYERS = 2


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with text, and a small run of one device in it."""
  folder = tmp_path_factory.mktemp('audit')
  text = small_run.write_text(folder)
  config = ExperimentConfig(
    model=ModelConfig(
      d_model=8,
      num_periods=LAYERS,
      mamba=MambaConfig(d_state=4, rom=RoMConfig(kind='shared', num_experts=4)),
    ),
    data=DataConfig(train=(text,), valid=(text,)),
    train=TrainConfig(
      num_steps=2,
      batch_size=8,
      sequence_length=16,
      checkpoint_every=2,
      eval_every=2,
      eval_tokens=300,
    ),
    sample=SampleConfig(num_tokens=0),
  )
  small_run.run(config, folder / 'run')
  (folder / 'other.txt').write_text('another input')
  (folder / 'dense').mkdir()
  dense = json.loads((folder / 'run' / 'config.json').read_text())
  dense['model']['moe']['choice'] = 'expert'
  dense['model']['pattern'] = 'E'
  (folder / 'dense' / 'config.json').write_text(json.dumps(dense))
  return folder


def run_script(folder, *arguments):
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(ROOT / '.jax_cache')
  return subprocess.run(
    [sys.executable, str(ROOT / 'experiments' / 'audit_routing.py'), *arguments],
    cwd=folder,
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
    },
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.slow
def test_a_record_is_written_and_replayed_and_thresholds_are_tried(folder):
  shared = ('--checkpoint=run', '--input=text.jsonl', '--max_tokens=500')
  first = run_script(folder, *shared, '--output=new/routes.jsonl')
  assert first.returncode == 0, first.stderr
  assert first.stderr.splitlines()[-LAYERS - 1].startswith('layer')
  lines = (folder / 'new' / 'routes.jsonl').read_text().splitlines()
  assert len(lines) == 1 + 500 * LAYERS

  injections = ('--inject=all:0.5', '--inject=1:0.5', '--inject=mamba_0:0')
  sweep = ('--fallback_sweep=sweep.png', '--fallback_tolerance=100')
  replayed = run_script(folder, *shared, '--replay=new/routes.jsonl', *injections, *sweep)
  assert replayed.returncode == 0, replayed.stderr
  result = json.loads(replayed.stdout.splitlines()[-1])
  assert (result['tokens'], result['step'], result['last_document_cut']) == (500, 2, True)
  assert result['replay']['max_abs_difference'] == result['replay']['decisions_that_differ'] == 0
  everywhere, one, nowhere = result['injections']
  assert one['layers'] == ['01 mamba'] and nowhere['layers'] == everywhere['layers']
  assert everywhere['routes_changed'] > one['routes_changed'] > 0
  assert one['loss_rise'] != 0 and nowhere['loss_rise'] == 0 and not nowhere['tokens_changed']
  bits = result['loss'] * result['tokens'] / result['bits_per_byte']
  assert abs(bits / 0.6931471805599453 / 500 - 1) < 0.1  # about one byte a token
  assert [layer['name'] for layer in result['layers']] == ['00 mamba', '01 mamba']

  points = result['fallback']['points']
  thresholds, rates = (
    [point[key] for point in points] for key in ('threshold', 'fallback_fraction')
  )
  assert thresholds == sorted(thresholds) and rates == sorted(rates) and 0 < rates[-1] <= 1
  assert result['fallback']['chosen_threshold'] == thresholds[-1]  # any rise is tolerated
  assert (folder / 'sweep.png').read_bytes().startswith(b'\x89PNG')

  # Another input is not what the record was made of.
  other = run_script(folder, '--checkpoint=run', '--input=other.txt', '--replay=new/routes.jsonl')
  assert other.returncode == 2
  assert other.stderr.splitlines()[-1] == (
    'audit_routing.py: --replay=new/routes.jsonl was not made of this checkpoint and input: the '
    'input, or --max_tokens, is another'
  )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--checkpoint is not given'),
    (
      ['--checkpoint=dense', '--input=text.jsonl'],
      'config.model.moe.choice is expert, which looks at later tokens: the audit would not be',
    ),
    (
      ['--checkpoint=run', '--input=text.jsonl', '--output=text.jsonl'],
      '--output=text.jsonl is there already; give another name',
    ),
    (
      ['--checkpoint=run', '--input=text.jsonl', '--inject=all:2'],
      '--inject=all:2: it must be LAYER:RATE, with a RATE from 0 to 1',
    ),
  ],
)
@pytest.mark.slow
def test_a_mistake_is_one_line(folder, arguments, message):
  result = run_script(folder, *arguments)
  assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
  assert result.stderr.startswith(f'audit_routing.py: {message}')
