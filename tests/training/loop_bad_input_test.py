"""What a run refuses, it refuses with one line, and without a touch of its folder."""

import dataclasses
import shutil

import pytest

from ssm_moe.config import MambaConfig, MoEConfig, RoMConfig
from ssm_moe.errors import UserError
from ssm_moe.training import workdir as workdir_lib
from tests.training import small_run


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return small_run.write_text(tmp_path_factory.mktemp('text'))


@pytest.fixture(scope='module')
def finished(text, tmp_path_factory):
  """A run on one device, and what is in its folder."""
  config = small_run.make_config(text)
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  small_run.run(config, workdir)
  return config, workdir, small_run.snapshot(workdir)


def _refuse(finished, config, match):
  _, workdir, before = finished
  with pytest.raises(UserError, match=match) as error:
    small_run.run(config, workdir)
  assert '\n' not in str(error.value) and error.value.exit_status == 2
  assert small_run.snapshot(workdir) == before


@pytest.mark.parametrize(
  ('group', 'change', 'match'),
  [
    ('model', {'vocab_size': 100}, r'vocab_size is 100; .* at least 257'),
    ('model', {'d_model': 16}, r'another architecture: model.d_model is 8 .* 16 now'),
    (
      'model',
      {'pattern': 'M E', 'moe': MoEConfig(num_experts=2, choice='expert')},
      'moe.choice is expert, .* evaluation would not be autoregressive',
    ),
    ('model', {'pattern': 'M E'}, "another architecture: model.pattern is 'M' .* 'M E' now"),
    (
      'model',
      {'pattern': 'M E', 'moe': MoEConfig(router_groups=3)},
      'router_groups is 3; it must divide the 128 tokens',
    ),
    (
      'model',
      {'mamba': MambaConfig(rom=RoMConfig(kind='shared', router_groups=5))},
      'mamba.rom.router_groups is 5; it must divide the 128 tokens',
    ),
    ('data', {'train': ('absent.txt',)}, 'absent.txt: no such file'),
    ('data', {'carry_state': True}, 'model_state'),
    ('data', {'valid': ('selective_copying',)}, 'sequence_length of at least 32; it is 16'),
    ('data', {'tokenizer': 'absent.json'}, 'absent.json'),
    ('train', {'num_steps': 5}, 'num_steps is 5; .* at step 7, so it must be at least 7'),
  ],
)
def test_config(finished, group, change, match):
  config = finished[0]
  change = dataclasses.replace(getattr(config, group), **change)
  _refuse(finished, dataclasses.replace(config, **{group: change}), match)


@pytest.mark.parametrize(
  ('group', 'change', 'match'),
  [
    ('train', {'batch_size': 12}, 'batch_size is 12; .* 8 devices .*: 8 or 16 would do$'),
    ('train', {'accumulation_steps': 2}, 'batch_size is 8; .* times 2 .*: 16 would do$'),
    ('mesh', {'expert': 3}, ': expert 3 .* number of devices, 8; expert 1, 2, 4 or 8 would$'),
    ('mesh', {'data': 16}, 'data 16 .* devices, 8; data 8, or mesh.data left unset would$'),
    ('mesh', {'expert': 8}, 'expert is 8, .* the 4 experts of .*mamba.rom; 1, 2 or 4 would$'),
  ],
)
def test_mesh(finished, text, group, change, match):
  config = small_run.make_config(text, 'rom')  # on eight devices
  change = dataclasses.replace(getattr(config, group), **change)
  _refuse(finished, dataclasses.replace(config, **{group: change}), match)


@pytest.mark.parametrize(
  ('data', 'match'),
  [
    (b'', 'the file is empty'),
    (b'text \xff\xfe text', r'not UTF-8 \(byte 5'),
    (b'few', 'has 4 tokens'),
  ],
)
def test_data(finished, tmp_path, data, match):
  config = finished[0]
  path = tmp_path / 'bad.txt'
  path.write_bytes(data)
  changed = dataclasses.replace(config.data, train=(str(path),), cache_dir=str(tmp_path / 'c'))
  _refuse(finished, dataclasses.replace(config, data=changed), f'bad.txt.*{match}')


def test_every_checkpoint_damaged(finished, tmp_path):
  config, workdir, _ = finished
  shutil.copytree(workdir, tmp_path / 'run')
  for manifest in (tmp_path / 'run' / 'checkpoints').glob('*/MANIFEST.json'):
    manifest.write_bytes(b'?')
  damaged = (config, tmp_path / 'run', small_run.snapshot(tmp_path / 'run'))
  _refuse(damaged, config, 'no checkpoint is good .* give another workdir')


def test_validation_text_that_is_all_empty(finished, tmp_path):
  config = finished[0]
  path = tmp_path / 'empty.jsonl'
  path.write_text('{"text": ""}\n' * 3)
  changed = dataclasses.replace(config.data, valid=(str(path),), cache_dir=str(tmp_path / 'c'))
  _refuse(finished, dataclasses.replace(config, data=changed), 'data.valid.* all empty')


def test_a_run_that_another_process_trains(finished):
  config, workdir, _ = finished
  with (
    workdir_lib.held(workdir),
    pytest.raises(UserError, match='is training in'),
  ):
    small_run.run(config, workdir)


@pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl', 'loss.png', 'checkpoints'])
def test_a_folder_of_another_program(finished, tmp_path, name):
  (tmp_path / name).write_text('{"mine": 1}')
  _refuse((finished[0], tmp_path, small_run.snapshot(tmp_path)), finished[0], f'{name}.*another')


def test_a_path_in_which_checkpoints_would_be_lost(finished, tmp_path):
  with pytest.raises(UserError, match='need a path without'):
    small_run.run(finished[0], tmp_path / 'lr[3]')
  assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_a_file(text, tmp_path):
  path = tmp_path / 'file'
  path.write_text('mine')
  with pytest.raises(UserError, match='the workdir is a file'):
    small_run.run(small_run.make_config(text), path)
  assert path.read_text() == 'mine'
