"""The script: a folder becomes a run and a folder again, and a mistake is one line."""

import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest

from ssm_moe.config import ExperimentConfig, ModelConfig, from_config_dict, to_config_dict
from ssm_moe.errors import UserError
from ssm_moe.training import workdir as workdir_lib
from tests.interop import published
from tests.training import small_run

ROOT = pathlib.Path(__file__).parents[2]
# As many words as the models have tokens.
_VOCABULARY = ['<|endoftext|>', *'abcdef']
_TOKENIZER = {
  'version': '1.0',
  'added_tokens': [
    {
      'id': 0,
      'content': '<|endoftext|>',
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
      'special': True,
    }
  ],
  'pre_tokenizer': {'type': 'Whitespace'},
  'model': {
    'type': 'WordLevel',
    'vocab': {word: i for i, word in enumerate(_VOCABULARY)},
    'unk_token': 'a',
  },
}


@pytest.fixture
def folder(tmp_path):
  """A folder with a model, `theirs`, and its tokenizer."""
  config, shapes = published.MODELS['mamba2']
  published.write(tmp_path / 'theirs', config, published.tensors_of(shapes))
  (tmp_path / 'theirs' / 'tokenizer.json').write_text(json.dumps(_TOKENIZER))
  return tmp_path


def run(folder, *arguments):
  return subprocess.run(
    [sys.executable, str(ROOT / 'experiments' / 'convert.py'), *arguments],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=100,
  )


@pytest.mark.slow
def test_a_folder_becomes_a_run_and_a_folder_again(folder):
  there = run(folder, '--from=theirs', '--to=runs/imported')
  assert there.returncode == 0, there.stderr
  result = json.loads(there.stdout.splitlines()[-1])
  theirs, tensors = published.read(folder / 'theirs')
  assert result == {
    'from': 'theirs',
    'to': 'runs/imported',
    'parameters': sum(tensor.size for tensor in tensors.values()),
    'tokenizer': 'theirs/tokenizer.json',
  }
  experiment = workdir_lib.read_config(folder / 'runs' / 'imported')
  assert experiment.model.pattern == 'S'
  # Moved with its folder.
  shutil.move(folder / 'runs' / 'imported', folder / 'moved')
  back = run(folder, '--from=moved', '--to=ours')
  assert back.returncode == 0, back.stderr
  assert json.loads(back.stdout)['tokenizer'] == 'moved/tokenizer.json'
  ours, again = published.read(folder / 'ours')
  assert {name: tensor.tobytes() for name, tensor in again.items()} == {
    name: tensor.tobytes() for name, tensor in tensors.items()
  }
  assert (ours['eos_token_id'], ours['n_groups']) == (0, theirs['n_groups'])
  assert json.loads((folder / 'ours' / 'tokenizer.json').read_text()) == _TOKENIZER


def _assert_refused(folder, arguments, message):
  before = small_run.snapshot(folder)
  result = run(folder, *arguments)
  assert (result.returncode, result.stdout) == (2, '')
  (line,) = result.stderr.splitlines()
  assert line.startswith('convert.py: ') and message in line, line
  assert small_run.snapshot(folder) == before


def test_a_folder_that_is_there_is_not_written_over(folder):
  _assert_refused(
    folder, ['--from=theirs', '--to=theirs'], '--to=theirs is there already; give another name'
  )


@pytest.mark.slow
def test_a_model_with_experts_is_refused_before_its_checkpoint_is_read(folder):
  values = {'pattern': 'M', 'mamba': {'rom': {'kind': 'shared'}}}
  (folder / 'run').mkdir()
  (folder / 'run' / 'config.json').write_text(json.dumps({'model': values}))
  _assert_refused(folder, ['--from=run', '--to=new'], "mamba.rom.kind is 'shared'; in the format")


def test_the_config_of_a_workdir_is_one_to_train_with(tmp_path):
  get_config = runpy.run_path(str(ROOT / 'experiments' / 'configs' / 'of_workdir.py'))['get_config']
  experiment = ExperimentConfig(model=ModelConfig(d_model=24, pattern='M E'))
  workdir_lib.write_config(tmp_path, experiment)
  assert from_config_dict(get_config(str(tmp_path))) == experiment
  assert to_config_dict(experiment).model.mamba.d_inner is None  # and can be set
  for absent in (None, str(tmp_path / 'absent')):
    with pytest.raises(UserError, match=r'of_workdir\.py:WORKDIR|there is no such file'):
      get_config(absent)
