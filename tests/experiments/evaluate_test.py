"""The script: one JSON object, of text, of context lengths, of tasks."""

import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import pytest
from absl import flags

from ssm_moe.errors import UserError
from tests.training import finished_run, small_run

ROOT = pathlib.Path(__file__).parents[2]
HARNESS = importlib.util.find_spec('lm_eval') is not None
TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: 0
doc_to_choice: ["abc", "cab"]
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with text, a run of a model that has learnt nothing, and a task."""
  folder = tmp_path_factory.mktemp('evaluate')
  text = small_run.write_text(folder)
  finished_run.write(small_run.make_config(text), folder / 'run')
  (folder / 'tasks').mkdir()
  (folder / 'tasks' / 'own.yaml').write_text(TASK.format(data=text))
  return folder


def run_script(folder, *arguments):
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(ROOT / '.jax_cache')
  return subprocess.run(
    [sys.executable, str(ROOT / 'experiments' / 'evaluate.py'), *arguments],
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
def test_text_is_evaluated_alone(folder):
  done = run_script(folder, '--checkpoint=run', '--data=text.jsonl')
  assert done.returncode == 0, done.stderr
  (line,) = done.stdout.splitlines()
  result = json.loads(line)
  assert list(result) == [
    'checkpoint',
    'step',
    'data',
    'sequence_length',
    'loss',
    'perplexity',
    'bits_per_byte',
    'tokens',
    'bytes',
  ]
  assert (result['checkpoint'], result['data']) == ('run', ['text.jsonl'])
  assert result['tokens'] == result['bytes'] + 60  # documents


@pytest.fixture
def call(folder, monkeypatch, capsys):
  """Runs the script in this process; returns what it printed last."""
  before = set(flags.FLAGS)
  monkeypatch.chdir(folder)
  script = runpy.run_path(str(ROOT / 'experiments' / 'evaluate.py'), run_name='not main')

  def call(*arguments):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(['evaluate.py', *arguments])
    with jax.numpy_dtype_promotion('standard'):
      script['main']()
    return json.loads(capsys.readouterr().out.splitlines()[-1])

  yield call
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)


@pytest.mark.slow
def test_context_lengths_are_compared_where_nothing_can_be_written(folder, call, monkeypatch):
  # Not tokenised before.
  (folder / 'other.jsonl').write_bytes((folder / 'text.jsonl').read_bytes())
  before = small_run.snapshot(folder / 'run')
  monkeypatch.setattr(os, 'access', lambda *_: False)  # the administrator may always write
  settings = ('--context_lengths=16,32', '--carry_state', '--plot=new/context.png')
  result = call('--checkpoint=run', '--data=other.jsonl', '--batch_size=2', *settings)
  assert small_run.snapshot(folder / 'run') == before
  assert result['carry_state'] and result['documents'] and result['documents_skipped']
  short, long = result['context_lengths']
  assert (short['context_length'], long['context_length']) == (16, 32)
  assert short['loss'] == pytest.approx(long['loss'], rel=1e-5)
  for each in (short, long):
    assert sum(part['tokens'] for part in each['positions']) == result['tokens']
  assert (folder / 'new' / 'context.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
@pytest.mark.skipif(not HARNESS, reason='needs the extra [eval]')
def test_tasks_of_a_folder_are_run(folder, call, monkeypatch):
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', folder / 'cache')
  settings = ('--include_path=tasks', '--limit=3', '--output=new/own.json')
  result = call('--checkpoint=run', '--harness=own', *settings)
  assert result['tasks'] == ['own'] and 0 <= result['harness']['own']['acc,none'] <= 1
  written = json.loads((folder / 'new' / 'own.json').read_text())
  assert written['results'] == result['harness'] and written['n-samples']['own']['effective'] == 3


MISTAKES = [
  ([], '--checkpoint is not given'),
  (['--checkpoint=none'], 'none: has no config.json; it must be a folder that train.py wrote'),
  (['--checkpoint=run', '--data=none.txt'], '--data: none.txt: no such file or folder'),
  (['--checkpoint=run', '--data='], '--data has an empty name'),
  (['--checkpoint=run', '--context_lengths=0,16'], '--context_lengths=0,16: it must be positive'),
  (['--checkpoint=run', '--context_lengths=512'], '--context_lengths: no document has 512 tokens'),
  (['--checkpoint=run', '--plot=x.png'], '--plot belongs to --context_lengths, which is not'),
  (['--checkpoint=run', '--harness=own', '--data=x'], '--data belongs to text, which is not'),
]
if not HARNESS:
  MISTAKES.append((['--checkpoint=run', '--harness=own'], '--harness needs the package lm-eval'))


@pytest.mark.slow
def test_mistakes_are_told_in_one_line_each(call):
  for arguments, message in MISTAKES:
    with pytest.raises(UserError) as raised:
      call(*arguments)
    assert str(raised.value).startswith(message)
