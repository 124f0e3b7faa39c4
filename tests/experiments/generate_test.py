"""The script: text as it comes, many samples, a document kept, and mistakes as one line."""

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
  SampleConfig,
  TrainConfig,
)
from tests.training import small_run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with text, and a small run of one device in it."""
  folder = tmp_path_factory.mktemp('generate')
  text = small_run.write_text(folder)
  config = ExperimentConfig(
    model=ModelConfig(d_model=8, num_periods=1, mamba=MambaConfig(d_state=4)),
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
  return folder


def run_script(folder, *arguments, text=''):
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(ROOT / '.jax_cache')
  return subprocess.run(
    [sys.executable, str(ROOT / 'experiments' / 'generate.py'), *arguments],
    cwd=folder,
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
    },
    input=text.encode(),
    capture_output=True,
    timeout=120,
  )


@pytest.mark.slow
def test_text_comes_alone_or_as_lines_and_goes_on_from_a_file(folder):
  common = ('--checkpoint=run', '--temperature=0')
  # The end of the last line of standard input is no part of the prompt.
  keep = ('--max_tokens=12', '--save_state=new/state.npz')
  first = run_script(folder, *common, *keep, text='a prompt\n')
  assert first.returncode == 0, first.stderr
  kept, took = first.stderr.decode().splitlines()[-2:]
  assert kept == '21 tokens are kept in new/state.npz' and took.startswith('12 tokens in ')
  rest = run_script(folder, *common, '--load_state=new/state.npz', '--max_tokens=18')
  assert rest.returncode == 0, rest.stderr
  whole = (first.stdout[:-1] + rest.stdout).decode()

  (folder / 'prompts.txt').write_text('a prompt\nanother\n')
  many = run_script(
    folder, *common, '--prompts_file=prompts.txt', '--num_samples=2', '--max_tokens=30'
  )
  assert many.returncode == 0, many.stderr
  lines = [json.loads(line) for line in many.stdout.splitlines()]
  assert [(line['prompt'], line['sample']) for line in lines] == [
    ('a prompt', 0),
    ('a prompt', 1),
    ('another', 0),
    ('another', 1),
  ]
  assert lines[0]['text'] == lines[1]['text'] == whole[:-1]
  assert {(line['tokens'], line['end']) for line in lines} == {(30, 'max_tokens')}


@pytest.mark.extended
def test_a_file_that_is_no_state_is_one_line(folder):
  (folder / 'prompts.txt').write_text('a prompt')
  result = run_script(folder, '--checkpoint=run', '--load_state=prompts.txt')
  assert (result.returncode, result.stdout) == (2, b'')
  assert result.stderr == b'generate.py: prompts.txt: not a saved state, or damaged\n'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), '--checkpoint is not given'),
    (('--checkpoint=none', '--prompt=a'), 'none: has no config.json'),
    (('--checkpoint=run', '--num_samples=0'), '--num_samples=0: it must be 1 to 2147483647'),
    (('--checkpoint=run', f'--seed={2**64}'), f'--seed={2**64}: it must be 0 to 2147483647'),
    (('--checkpoint=run', '--top_p=1.5'), '--top_p is 1.5; it must be above 0 and at most 1'),
    (('--checkpoint=run', '--temperature=-1'), '--temperature is -1.0; it must be finite'),
    (('--checkpoint=run', '--stop='), '--stop= is empty; it must be the text to end before'),
    (
      ('--checkpoint=run', '--prompt=a', '--prompts_file=b'),
      '--prompt and --prompts_file are both',
    ),
    (('--checkpoint=run', '--max_tokens=0'), '--max_tokens=0 writes nothing; give --save_state'),
    (
      ('--checkpoint=run', '--save_state=s', '--num_samples=2'),
      '--save_state keeps one document; give one prompt',
    ),
    (
      ('--checkpoint=run', '--prompt=a', '--save_state=prompts.txt'),
      '--save_state=prompts.txt is there already; give another name',
    ),
  ],
)
@pytest.mark.extended
def test_a_mistake_is_one_line(folder, arguments, message):
  (folder / 'prompts.txt').write_text('a prompt\n')
  result = run_script(folder, *arguments)
  assert (result.returncode, result.stdout) == (2, b'')
  (line,) = result.stderr.decode().splitlines()
  assert line.startswith(f'generate.py: {message}')
