"""Runs that start from another, with adapters and dropout, and that stop early."""

import contextlib
import dataclasses

import chex
import jax
import numpy as np
import pytest

from ssm_moe.config import ConfigError, LoRAConfig, RoMConfig, to_dict
from ssm_moe.errors import UserError
from ssm_moe.training import initial, loop, report, trained
from ssm_moe.training import workdir as workdir_lib
from ssm_moe.training.checkpoint import Checkpointer
from tests.tolerances import FLOAT32_REORDERED, assert_close
from tests.training import small_run


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return small_run.write_text(tmp_path_factory.mktemp('text'))


def _changed(config, part, **fields):
  return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


@pytest.fixture(scope='module')
def source(text, tmp_path_factory):
  """The folder and the parameters of a run at step 5; not to be changed."""
  workdir = tmp_path_factory.mktemp('source')
  config = small_run.make_config(text, seed=7)
  with small_run.devices(config):
    params = loop.Program(config, loop.sharding.make_mesh(config.mesh)).init_state().params
  workdir_lib.write_config(workdir, config)
  with Checkpointer(workdir / 'checkpoints', config=to_dict(config), keep_last=1) as checkpointer:
    checkpointer.save(5, {'params': params}, metadata={})
  return workdir, jax.device_get(params)


@pytest.mark.slow
def test_adapters_with_dropout_and_patience_end_as_if_never_stopped(
  text, source, tmp_path, monkeypatch, capfd
):
  # As fine-tuning is done: from another run, with all that it has.
  config = small_run.make_config(
    text,
    initialize_from=str(source[0]),
    dropout=0.2,
    early_stopping_patience=3,
    eval_every=2,
    checkpoint_every=100,
  )
  config = dataclasses.replace(config, lora=LoRAConfig(rank=2, alpha=4.0))
  small_run.run(config, tmp_path / 'whole')
  said = capfd.readouterr().err
  assert f'params   of step 5 of {source[0]}' in said
  assert 'trained  390 parameters of adapters of *_proj/kernel, and nothing else' in said

  class Stop(contextlib.nullcontext):
    looked = 0

    @property
    def requested(self):
      self.looked += 1
      return 'SIGTERM' if self.looked > 4 else None

    def __enter__(self):
      return self

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'StopSignals', Stop)
    assert small_run.run(config, tmp_path / 'stopped') is None
  small_run.run(config, tmp_path / 'stopped')
  whole, stopped = (small_run.arrays(config, tmp_path / name) for name in ('whole', 'stopped'))
  chex.assert_trees_all_equal(whole, stopped)
  assert small_run.rows(tmp_path / 'whole') == small_run.rows(tmp_path / 'stopped')

  # Evaluations are of the model with its adapters, else all would be equal.
  losses = [row['valid_loss'] for row in small_run.rows(tmp_path / 'whole') if 'valid_loss' in row]
  assert len(set(losses)) == len(losses)

  # The model is the other run's; what has moved are the adapters, and who reads it gets both.
  state, _ = whole
  assert len(jax.tree.leaves(state.opt_state[1][0].mu)) == len(jax.tree.leaves(state.adapters))
  chex.assert_trees_all_equal(state.params, source[1])
  merged, _ = trained.read_params(tmp_path / 'whole', config)
  for name in ('in_proj', 'out_proj'):
    base, adapter, both = (
      tree['periods']['layer_mamba_0'][name]['kernel']
      for tree in (state.params, state.adapters, merged)
    )
    down = adapter['down'].reshape(2, base.shape[1], 2)
    up = adapter['up'].reshape(2, 2, -1)
    assert np.abs(up).max() > 0
    expected = base + 4.0 / 2 * (down @ up).reshape(base.shape)
    assert_close(both, expected, rtol=FLOAT32_REORDERED)


@pytest.fixture
def valid_losses(monkeypatch):
  """Puts losses, one after the other, in the place of those of evaluations."""
  original = report.Evaluation.from_sums

  def arm(*losses):
    losses = iter(losses)

    def from_sums(*args, **kwargs):
      return original(*args, **kwargs)._replace(loss=next(losses))

    monkeypatch.setattr(loop.report.Evaluation, 'from_sums', from_sums)

  return arm


@pytest.mark.slow
def test_a_run_stops_early_and_its_best_checkpoint_is_used(text, tmp_path, valid_losses, capfd):
  config = small_run.make_config(
    text, early_stopping_patience=2, eval_every=1, checkpoint_every=100, keep_checkpoints=1
  )
  valid_losses(3.0, 2.0, 2.5, 2.1)
  summary = small_run.run(config, tmp_path)
  assert (summary['final_step'], summary['best_step'], summary['best_valid_loss']) == (4, 2, 2.0)
  assert small_run.steps(tmp_path) == [2, 4]
  message = (
    'stopped early at step 4: the last 2 evaluations had no lower validation loss than 2.0000, of '
    'step 2; that checkpoint is kept, and is the one that is used'
  )
  assert message in capfd.readouterr().err.splitlines()

  valid_losses(7.0)
  assert trained.read_params(tmp_path, config)[1] == 2
  rows = small_run.rows(tmp_path)
  again = small_run.run(config, tmp_path)
  assert (again['final_step'], again['valid_loss'], again['best_step']) == (4, 7.0, 2)
  assert message in capfd.readouterr().err.splitlines()
  assert small_run.rows(tmp_path) == rows


def _folder(tmp_path, config):
  """The folder of a run whose checkpoint cannot be read."""
  workdir = tmp_path / 'other'
  workdir.mkdir()
  workdir_lib.write_config(workdir, config)
  return workdir


def test_what_cannot_be_started_from_is_one_line(text, tmp_path):
  small = small_run.make_config(text)
  other = _folder(tmp_path, small)
  mine = tmp_path / 'mine'
  routed = dataclasses.replace(small.model.mamba, rom=RoMConfig(kind='shared', num_experts=2))
  config = _changed(small, 'train', initialize_from=str(other))
  for changed, workdir, message in (
    (config, other, f'{other} is the workdir of this run; give that of another'),
    (
      _changed(config, 'model', mamba=routed),
      mine,
      f'{other} has other parameters: periods/layer_mamba_0/in_proj/kernel is (2, 8, 2, 16) there '
      'and (2, 2, 8, 2, 16) here, and 2 more differ',
    ),
    (config, mine, f'{other} has no checkpoint; train it first'),
    (
      _changed(config, 'train', initialize_from=str(mine)),
      tmp_path,
      f'{mine}: has no config.json; it must be a folder that train.py wrote',
    ),
  ):
    with pytest.raises(ConfigError) as caught:
      initial.check(changed, workdir)
    assert str(caught.value) == f'config.train.initialize_from: {message}'
  initial.check(small, mine)


@pytest.mark.slow
def test_another_function_of_the_same_parameters_is_said(text, source):
  config = small_run.make_config(text, initialize_from=str(source[0]))
  norm = dataclasses.replace(config.model.norm, epsilon=1e-6)
  config = _changed(config, 'model', norm=norm)
  initial.check(config, source[0] / 'mine')
  params, notes = initial.read(config, loop.sharding.make_mesh(config.mesh))
  chex.assert_trees_all_equal(jax.device_get(params), source[1])
  assert notes == [
    f'params   of step 5 of {source[0]}',
    'changed  model.norm.epsilon is 1e-05 in the checkpoint and 1e-06 now',
  ]


@pytest.mark.slow
def test_what_is_trained_stays_while_a_run_goes_on(text, source, tmp_path):
  config = small_run.make_config(text)
  workdir = source[0]
  for part, fields in (
    ('optimizer', {'freeze': ('embedding',)}),
    ('lora', {'rank': 1}),
  ):
    message = rf'that trains other parameters: {part}\.'
    with small_run.devices(config), pytest.raises(UserError, match=message) as caught:
      loop.train_and_evaluate(_changed(config, part, **fields), workdir)
    assert '\n' not in str(caught.value)
