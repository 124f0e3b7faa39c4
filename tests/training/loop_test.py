"""A run that was stopped, killed or damaged ends as the run that never was, bit for bit."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import shutil
import signal
import sys
import time

import chex
import jax
import numpy as np
import pytest

from ssm_moe.config import (
  to_dict,
)
from ssm_moe.models import accounting
from ssm_moe.training import durable, loop, manifest, report
from ssm_moe.training.metrics import read_metrics
from tests.training import small_run


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return small_run.write_text(tmp_path_factory.mktemp('text'))


@pytest.fixture(scope='module', params=['mamba', pytest.param('rom', marks=pytest.mark.slow)])
def whole(request, text, tmp_path_factory):
  """A run that was never stopped: its config, folder and summary. Not to be changed."""
  config = small_run.make_config(text, request.param)
  workdir = tmp_path_factory.mktemp('whole') / request.param
  return config, workdir, small_run.run(config, workdir)


_mamba = pytest.mark.parametrize('whole', ['mamba'], indirect=True)


@pytest.fixture
def copy(whole, tmp_path):
  """A run to be changed."""
  config, workdir, _ = whole
  shutil.copytree(workdir, tmp_path / 'run')
  return config, tmp_path / 'run'


def _assert_equal(config, workdir, whole):
  """Asserts that a finished run equals the one never stopped."""
  _, expected_workdir, _ = whole
  (state, metadata), (expected_state, expected_metadata) = (
    small_run.arrays(config, folder) for folder in (workdir, expected_workdir)
  )
  chex.assert_trees_all_equal(state, expected_state)  # exact: no tolerance
  assert metadata == expected_metadata
  assert small_run.rows(workdir) == small_run.rows(expected_workdir)
  assert small_run.steps(workdir) == small_run.steps(expected_workdir)
  assert _valid_losses(workdir) == _valid_losses(expected_workdir)


def _valid_losses(workdir):
  """What decides the best checkpoint."""
  folders = sorted((workdir / 'checkpoints').iterdir())
  return [manifest.read(folder)['valid_loss'] for folder in folders]


def _without_events(snapshot):
  return {path: data for path, data in snapshot.items() if path.parts[0] != 'tensorboard'}


class TestWhole:
  def test_the_summary_says_how_it_ended(self, whole):
    config, workdir, summary = whole
    rows = read_metrics(workdir / 'metrics.jsonl')
    assert list(summary) == [
      'final_step',
      'train_loss',
      'valid_loss',
      'valid_bits_per_byte',
      'tokens_per_second',
      'workdir',
    ]
    assert summary['final_step'] == small_run.STEPS and summary['workdir'] == str(workdir)
    trained, evaluated = rows[-2], rows[-1]
    assert summary['train_loss'] == trained['train_loss']
    for key in ('valid_loss', 'valid_bits_per_byte'):
      assert math.isclose(summary[key], evaluated[key])
    tokens = config.train.num_steps * small_run.ROWS * small_run.LENGTH
    assert math.isclose(summary['tokens_per_second'], tokens / trained['seconds'])

  def test_the_rows_have_the_keys_and_the_steps_that_are_due(self, whole):
    config, workdir, _ = whole
    rows = read_metrics(workdir / 'metrics.jsonl')
    evaluations = [row for row in rows if 'valid_loss' in row]
    trained = [row for row in rows if 'train_loss' in row]
    assert [row['step'] for row in trained] == [2, 4, 6, 7]
    assert [row['step'] for row in evaluations] == [3, 6, 7]
    assert [row['step'] for row in rows] == [2, 3, 4, 6, 6, 7, 7]
    flops = accounting.account(config.model, small_run.LENGTH)['flops_per_token_train']
    for row in rows:
      assert row['tokens'] == row['step'] * small_run.ROWS * small_run.LENGTH
      assert row['flops'] == row['tokens'] * flops
      assert row['seconds'] > 0
    routing = {'expert_load_entropy', 'max_violation', 'dead_experts'}
    for row in trained:
      assert row['tokens_per_second'] > 0
      bits = row['train_loss'] / math.log(2)
      assert row['train_bits_per_byte'] > bits  # a document's end costs bits and has no bytes
    for row in evaluations:
      assert row['valid_bits_per_byte'] > row['valid_loss'] / math.log(2)
    for row in rows:
      assert (routing <= set(row)) == (config.model.mamba.rom.kind == 'shared')
      for key in routing & set(row):
        assert len(row[key]) == 2

  def test_everything_is_in_the_folder(self, whole):
    config, workdir, _ = whole
    assert json.loads((workdir / 'config.json').read_text()) == to_dict(config)
    assert (workdir / 'loss.png').read_bytes().startswith(b'\x89PNG')
    routed = config.model.mamba.rom.kind == 'shared'
    assert (workdir / 'expert_load.png').exists() == routed
    (events,) = (workdir / 'tensorboard').iterdir()
    assert b'valid_loss' in events.read_bytes()
    assert small_run.steps(workdir) == [3, 6, 7]
    evaluated = [row['valid_loss'] for row in small_run.rows(workdir) if 'valid_loss' in row]
    np.testing.assert_allclose(_valid_losses(workdir), evaluated, rtol=1e-6)

  def test_the_losses_fall_and_the_state_has_moved(self, whole):
    config, workdir, _ = whole
    state, metadata = small_run.arrays(config, workdir)
    assert (state.step, metadata['step']) == (small_run.STEPS, small_run.STEPS)
    assert (state.model_state is not None) == config.data.carry_state
    if state.model_state is not None:
      assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state.model_state))
    rows = [row for row in small_run.rows(workdir) if 'train_loss' in row]
    assert rows[-1]['train_loss'] < rows[0]['train_loss']


@pytest.fixture
def change_metrics(monkeypatch):
  """Puts what `change` gives, called with the step, in place of a step's own metrics."""

  def arm(change):
    original = small_run.Program.compile_train_step

    def compile_train_step(self, state, batch):
      compiled = original(self, state, batch)
      count = 0

      def train_step(state, batch):
        nonlocal count
        count += 1
        state, metrics = compiled(state, batch)
        return state, metrics.replace(**change(count))

      return train_step

    monkeypatch.setattr(small_run.Program, 'compile_train_step', compile_train_step)

  return arm


@_mamba
def test_a_row_is_the_mean_of_the_steps_since_the_row_before(whole, tmp_path, change_metrics):
  change_metrics(lambda step: {'loss': np.float32(step), 'gradient_norm': np.float32(10 * step)})
  small_run.run(whole[0], tmp_path)
  rows = [row for row in small_run.rows(tmp_path) if 'train_loss' in row]
  assert [row['train_loss'] for row in rows] == [1.5, 3.5, 5.5, 7.0]
  assert [row['gradient_norm'] for row in rows] == [20, 40, 60, 70]


@pytest.fixture
def stop_at(monkeypatch):
  """Sends SIGTERM to this process when the n-th batch (from 1) of the next run is asked for."""

  def arm(n):
    original = loop.TrainBatches.iterate

    def iterate(self, first_step=0):
      # A class, not a generator: the signal comes where the loop is.
      batches = original(self, first_step)

      class Batches:
        asked = 0

        def __next__(self):
          self.asked += 1
          if self.asked == n:
            os.kill(os.getpid(), signal.SIGTERM)
          return next(batches)

        def close(self):
          batches.close()

      return Batches()

    monkeypatch.setattr(loop.TrainBatches, 'iterate', iterate)

  yield arm


@pytest.fixture
def stop_in_evaluation(monkeypatch):
  """Sends SIGTERM in the second batch of the n-th evaluation (from 1) of the next run."""

  def arm(n):
    original = loop.EvalBatches.__iter__
    count = 0

    def batches(self):
      nonlocal count
      count += 1
      for i, batch in enumerate(original(self)):
        if count == n and i == 1:
          os.kill(os.getpid(), signal.SIGTERM)
        yield batch

    monkeypatch.setattr(loop.EvalBatches, '__iter__', batches)

  return arm


def _stop_in(monkeypatch, owner, name):
  """Sends SIGTERM to this process in the middle of the method's next call."""
  original = getattr(owner, name)

  def method(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)

  monkeypatch.setattr(owner, name, method)


class TestStopped:
  def test_by_signals_at_any_step(self, whole, tmp_path, monkeypatch, stop_at, capfd):
    # One batch is asked for ahead: the first signal comes in step 1, before a row was due; the
    # second in the step of an evaluation and a save; the third in the step before the last.
    config, _, summary = whole
    workdir = tmp_path / 'run'
    for asked, step in ((2, 1), (3, 3), (4, 6)):
      with monkeypatch.context() as patch:
        stop_at(asked)
        assert small_run.run(config, workdir) is None
        patch.undo()
      monkeypatch.undo()
      assert max(small_run.steps(workdir)) == step
      assert json.loads((workdir / 'config.json').read_text()) == to_dict(config)
      assert all(row['step'] <= step for row in small_run.rows(workdir))
      last = capfd.readouterr().err.splitlines()[-1]
      assert last.startswith(f'SIGTERM: step {step} is saved in {workdir}')
    end = small_run.run(config, workdir)
    for key in ('final_step', 'train_loss', 'valid_loss', 'valid_bits_per_byte'):
      assert end[key] == summary[key]
    _assert_equal(config, workdir, whole)

  def test_in_an_evaluation(self, whole, tmp_path, monkeypatch, stop_in_evaluation, capfd):
    # The evaluation is made up for when the run goes on: first that of step 3, which a second
    # signal cuts short again, then that of the last step.
    config, _, _ = whole
    workdir = tmp_path / 'run'
    for evaluation, step in ((1, 3), (1, 3), (3, 7)):
      stop_in_evaluation(evaluation)
      assert small_run.run(config, workdir) is None
      monkeypatch.undo()
      assert max(small_run.steps(workdir)) == step
      assert small_run.rows(workdir)[-1].keys() & {'train_loss', 'valid_loss'} == {'train_loss'}
      assert f'SIGTERM: step {step} is saved' in capfd.readouterr().err
    small_run.run(config, workdir)
    _assert_equal(config, workdir, whole)

  def test_while_it_warms_up(self, whole, tmp_path, monkeypatch, capfd):
    # However early the notice comes, a step is done and saved after it, unless an evaluation is to
    # be made up for: the last notice comes in the first batch of that of step 3.
    config, _, _ = whole
    workdir = tmp_path / 'run'
    for owner, name, step in (
      (small_run.Program, 'init_state', 1),
      (loop.Checkpointer, 'restore', 2),
      (small_run.Program, 'compile_train_step', 3),
      (small_run.Program, 'put', 3),
    ):
      _stop_in(monkeypatch, owner, name)
      assert small_run.run(config, workdir) is None
      monkeypatch.undo()
      assert max(small_run.steps(workdir)) == step
      assert f'SIGTERM: step {step} is saved in {workdir}' in capfd.readouterr().err
    small_run.run(config, workdir)
    _assert_equal(config, workdir, whole)

  def test_in_the_evaluation_of_a_finished_run(self, copy, monkeypatch, stop_in_evaluation, capfd):
    config, workdir = copy
    before = _without_events(small_run.snapshot(workdir))
    stop_in_evaluation(1)
    assert small_run.run(config, workdir) is None
    assert 'SIGTERM: step 7 is saved' in capfd.readouterr().err
    assert _without_events(small_run.snapshot(workdir)) == before

  @_mamba
  @pytest.mark.parametrize(
    'looks',
    [n if n in (1, 4, 8) else pytest.param(n, marks=pytest.mark.extended) for n in range(1, 9)],
  )
  def test_wherever_the_signal_falls_what_is_said_is_saved(
    self, whole, tmp_path, monkeypatch, capfd, looks
  ):
    class Stop(contextlib.nullcontext):
      """The signal comes right after the loop has looked for it so many times."""

      looked = 0

      @property
      def requested(self):
        self.looked += 1
        return 'SIGTERM' if self.looked > looks else None

      def __enter__(self):
        return self

    monkeypatch.setattr(loop, 'StopSignals', Stop)
    # Disks can be slow: what is said to be saved must not be on its way only.
    monkeypatch.setattr(durable, 'sync', lambda _: time.sleep(0.05))
    said = []
    say = loop.MetricsLogger.say

    def listen(self, text):
      if 'is saved' in text:
        said.extend(small_run.steps(tmp_path))
      say(self, text)

    monkeypatch.setattr(loop.MetricsLogger, 'say', listen)
    assert small_run.run(whole[0], tmp_path) is None
    assert said == small_run.steps(tmp_path)
    newest = max(small_run.steps(tmp_path))
    assert f'SIGTERM: step {newest} is saved' in capfd.readouterr().err
    assert all(row['step'] <= newest for row in small_run.rows(tmp_path))

  @pytest.mark.parametrize('lost', [1, pytest.param(2, marks=pytest.mark.extended), 3])
  def test_by_a_kill_after_a_checkpoint(self, copy, whole, lost, capfd):
    # What a kill -9 leaves: rows after the newest checkpoint, the last one cut short.
    config, workdir = copy
    rows = (workdir / 'metrics.jsonl').read_text()
    for step in small_run.steps(workdir)[-lost:]:
      shutil.rmtree(workdir / 'checkpoints' / f'{step:08d}')
    with (workdir / 'metrics.jsonl').open('a') as file:
      file.write('{"step": 8, "tok')
    (workdir / 'checkpoints' / '00000009.unfinished').mkdir()
    (workdir / 'loss.png').unlink()
    small_run.run(config, workdir)
    _assert_equal(config, workdir, whole)
    assert (workdir / 'loss.png').exists()
    # Without any checkpoint another run begins, and the rows of the first are not lost with it.
    kept = workdir / 'metrics.jsonl.old'
    assert kept.exists() == (lost == 3) and (lost < 3 or kept.read_text().startswith(rows))
    assert ('are kept as' in capfd.readouterr().err) == (lost == 3)

  @pytest.mark.parametrize('damage', ['truncated', 'flipped'])
  def test_by_damage_to_the_newest_checkpoint(self, copy, whole, damage, caplog):
    config, workdir = copy
    files = (workdir / 'checkpoints' / '00000007' / 'state').rglob('*')
    path = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    if damage == 'truncated':
      data = data[: len(data) // 2]
    else:
      data[len(data) // 2] ^= 1
    path.write_bytes(data)
    small_run.run(config, workdir)
    assert '00000007: checkpoint skipped' in caplog.text and path.name in caplog.text
    set_aside = workdir / 'checkpoints' / '00000007.damaged'
    assert set_aside.is_dir()
    shutil.rmtree(set_aside)
    _assert_equal(config, workdir, whole)


class TestFinished:
  def test_is_evaluated_again_and_nothing_else(self, copy, whole, capsys):
    config, workdir = copy
    *_, summary = whole
    before = _without_events(small_run.snapshot(workdir))
    again = small_run.run(config, workdir)
    assert again == summary | {'workdir': str(workdir)}
    after = _without_events(small_run.snapshot(workdir))
    for path in before:
      if path.suffix != '.png':
        assert after[path] == before[path], path
    assert after.keys() == before.keys()
    output, errors = capsys.readouterr()
    assert errors.splitlines()[-1] == 'evaluating ...'
    if config.sample.num_tokens:
      assert output.startswith('ab') and 2 <= len(output.rstrip('\n')) <= 5
    else:
      assert output == ''

  @_mamba
  def test_its_config_stays_if_no_step_is_taken(self, copy):
    config, workdir = copy
    other = dataclasses.replace(config, sample=dataclasses.replace(config.sample, num_tokens=1))
    small_run.run(other, workdir)
    assert json.loads((workdir / 'config.json').read_text()) == to_dict(config)

  @_mamba
  def test_a_full_disk_below_standard_output_is_named(self, copy, monkeypatch):
    class Full(io.StringIO):
      def write(self, _):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left') as error:
      patch.setattr(sys, 'stdout', Full())
      small_run.run(*copy)
    assert error.value.filename == 'standard output'

  @_mamba
  def test_goes_on_with_more_steps_and_says_what_changed(self, copy, capfd):
    config, workdir = copy
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=9))
    before = small_run.rows(workdir)
    assert small_run.run(longer, workdir)['final_step'] == 9
    said = capfd.readouterr().err.splitlines()
    assert said[said.index(f'workdir  {workdir}') + 1 :][:2] == [
      'changed  train.num_steps is 7 in the checkpoint and 9 now',
      'compiling ...',
    ]
    rows = small_run.rows(workdir)
    assert rows[: len(before)] == before
    assert [(row['step'], 'valid_loss' in row) for row in rows[len(before) :]] == [
      (8, False),
      (9, False),
      (9, True),
    ]
    assert json.loads((workdir / 'config.json').read_text())['train']['num_steps'] == 9
    state, metadata = small_run.arrays(longer, workdir)
    assert (state.step, metadata['tokens']) == (9, 9 * small_run.ROWS * small_run.LENGTH)


@_mamba
class TestNotFinite:
  @pytest.mark.parametrize('name', ['loss', 'gradient_norm'])
  def test_a_step_stops_the_run_and_the_last_checkpoint_is_good(
    self, whole, tmp_path, monkeypatch, change_metrics, name
  ):
    config, _, _ = whole
    change_metrics(lambda step: {name: np.float32('nan')} if step >= 5 else {})
    with pytest.raises(loop.TrainingError, match=r'^step 5: .*nan.* step 3 is kept') as error:
      small_run.run(config, tmp_path)
    assert '\n' not in str(error.value) and error.value.exit_status == 1
    assert small_run.steps(tmp_path) == [3]
    assert [row['step'] for row in small_run.rows(tmp_path)] == [2, 3, 4]
    monkeypatch.undo()
    small_run.run(config, tmp_path)
    _assert_equal(config, tmp_path, whole)

  def test_parameters_that_are_not_fit_to_go_on_from_are_not_saved(self, whole, tmp_path):
    # The loss of a step is that of the parameters before it: here the update of step 1 is what
    # destroys them, and step 1 itself looks well.
    config, _, _ = whole
    absurd = dataclasses.replace(
      config,
      optimizer=dataclasses.replace(config.optimizer, peak_learning_rate=1e30),
      train=dataclasses.replace(config.train, checkpoint_every=1, log_every=1),
    )
    with pytest.raises(
      loop.TrainingError, match=r'^step 2: the loss is nan.*; there is no checkpoint'
    ):
      small_run.run(absurd, tmp_path)
    assert not (tmp_path / 'checkpoints').exists()
    small_run.run(config, tmp_path)
    _assert_equal(config, tmp_path, whole)

  def test_an_evaluation_stops_the_run_before_it_is_saved(self, whole, tmp_path, monkeypatch):
    config, _, _ = whole
    original = report.Evaluation.from_sums
    results = []

    def from_sums(*args, **kwargs):
      results.append(original(*args, **kwargs))
      return results[-1]._replace(loss=math.inf) if len(results) == 2 else results[-1]

    monkeypatch.setattr(loop.report.Evaluation, 'from_sums', from_sums)
    with pytest.raises(
      loop.TrainingError, match=r'^step 6: the validation loss is inf; .* step 3 is'
    ):
      small_run.run(config, tmp_path)
    assert small_run.steps(tmp_path) == [3]
    monkeypatch.undo()
    small_run.run(config, tmp_path)
    _assert_equal(config, tmp_path, whole)
