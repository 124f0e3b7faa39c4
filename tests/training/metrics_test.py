"""Every step is reported once, whatever cut a run short, and what is written can be read."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util

from ssm_moe.errors import UserError
from ssm_moe.training import metrics
from ssm_moe.training.metrics import MetricsLogger, read_metrics
from tests.training import full_disk


def train_row(step, **more):
  row = {'step': step, 'tokens': step * 10, 'flops': 1e12 * step, 'seconds': 0.5 * step}
  return row | {'train_loss': 1 / step, 'tokens_per_second': 1e5} | more


def eval_row(step):
  return {'step': step, 'valid_loss': 2 / step, 'valid_bits_per_byte': 3 / step}


def write_steps(workdir, first_step, steps, total=100):
  with MetricsLogger(workdir, first_step=first_step, total_steps=total) as logger:
    for step in steps:
      logger.write(train_row(step))


def tensorboard(workdir):
  """Points of each curve, as TensorBoard shows them."""
  accumulator = plugin_event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard'), size_guidance={plugin_event_accumulator.TENSORS: 0}
  )
  accumulator.Reload()
  return {
    tag: [(event.step, tensor_util.make_ndarray(event.tensor_proto)) for event in events]
    for tag in accumulator.Tags()['tensors']
    for events in [accumulator.Tensors(tag)]
  }


class TestRows:
  def test_rows_come_back_in_a_stable_order(self, tmp_path):
    with MetricsLogger(tmp_path, first_step=0, total_steps=9) as logger:
      logger.write({'zeta': 1, 'train_loss': 2.5, 'alpha': [1, 2.5], 'tokens': 5, 'step': 1})
      logger.write({'valid_loss': 2.0, 'step': 1, 'seconds': 3.0})
    rows = read_metrics(tmp_path / 'metrics.jsonl')
    assert rows == [
      {'step': 1, 'tokens': 5, 'train_loss': 2.5, 'alpha': [1, 2.5], 'zeta': 1},
      {'step': 1, 'seconds': 3.0, 'valid_loss': 2.0},
    ]
    assert list(rows[0]) == ['step', 'tokens', 'train_loss', 'alpha', 'zeta']

  def test_any_kind_of_number_becomes_strict_json(self, tmp_path):
    def refuse(constant):
      raise AssertionError(constant)

    with MetricsLogger(tmp_path, first_step=0, total_steps=9) as logger:
      logger.write(
        {
          'step': np.int64(1),
          'train_loss': jnp.float32(0.1),
          'half': jnp.bfloat16(1.5),
          'layers': np.array([0.1, np.nan, -np.inf], np.float32),
          'gradient_norm': math.inf,
          'count': jnp.int32(3),
          'kind': 'x',
        }
      )
    text = (tmp_path / 'metrics.jsonl').read_text()
    assert json.loads(text, parse_constant=refuse) == {
      'step': 1,
      'train_loss': 0.1,
      'count': 3,
      'gradient_norm': None,
      'half': 1.5,
      'kind': 'x',
      'layers': [0.1, None, None],
    }

  def test_a_row_can_be_read_before_the_next_is_written(self, tmp_path):
    with MetricsLogger(tmp_path, first_step=0, total_steps=9) as logger:
      for step in (1, 2):
        logger.write(train_row(step))
        assert read_metrics(tmp_path / 'metrics.jsonl')[-1]['step'] == step
        assert [step for step, _ in tensorboard(tmp_path)['train_loss']][-1] == step

  @pytest.mark.parametrize(
    'torn', [b'{"step": 3, "tok', b'\x00\x00\x00', b'{"step": 3, "kind": "\xc3']
  )
  def test_a_torn_last_line_is_left_out(self, tmp_path, torn):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert read_metrics(path) == [{'step': 1}, {'step': 2}]
    write_steps(tmp_path, 2, [3])
    assert [row['step'] for row in read_metrics(path)] == [1, 2, 3]
    assert path.read_bytes().startswith(b'{"step": 1}\n{"step": 2}\n{"step": 3, ')

  @pytest.mark.parametrize('line', ['{"step": 1', '[1]', '{"tokens": 1}', '{"step": "1"}', ''])
  def test_another_bad_line_is_named(self, tmp_path, line):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r'metrics\.jsonl: line 2'):
      read_metrics(path)
    with pytest.raises(UserError, match=r'metrics\.jsonl: line 2'):
      MetricsLogger(tmp_path, first_step=1, total_steps=9)
    assert path.read_bytes() == before

  def test_a_last_line_that_is_not_torn_is_not_ours_to_drop(self, tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('notes of my own\n')
    with pytest.raises(UserError, match=r'metrics\.jsonl: line 1'):
      MetricsLogger(tmp_path, first_step=0, total_steps=9)
    assert path.read_text() == 'notes of my own\n'

  @pytest.mark.parametrize('room', [0, 150])
  def test_a_full_disk_is_said_with_the_file(self, tmp_path, room):
    path = tmp_path / 'metrics.jsonl'
    with MetricsLogger(tmp_path, first_step=0, total_steps=9) as logger:
      logger.write(train_row(1))
      events = next((tmp_path / 'tensorboard').iterdir())
      # Without room the row itself fails; with a little, the events, which are longer.
      size = max(path.stat().st_size + room, room and events.stat().st_size)
      with full_disk.beyond(size):
        with pytest.raises(OSError, match='File too large') as error:
          logger.write(train_row(2))
        logger.close()
    assert error.value.filename == str(tmp_path / 'tensorboard' if room else path)
    write_steps(tmp_path, 1, [2, 3])
    assert [row['step'] for row in read_metrics(path)] == [1, 2, 3]

  def test_no_file_is_a_user_error(self, tmp_path):
    with pytest.raises(UserError, match='absent'):
      read_metrics(tmp_path / 'absent.jsonl')


class TestResume:
  def test_rows_after_the_restored_step_are_dropped(self, tmp_path):
    with MetricsLogger(tmp_path, first_step=0, total_steps=9) as logger:
      for step in (1, 2, 3, 4, 5):
        logger.write(train_row(step))
        logger.write(eval_row(step))
    kept = (tmp_path / 'metrics.jsonl').read_text().splitlines()[:6]
    write_steps(tmp_path, 3, [4, 5, 6])
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert lines[:6] == kept
    assert [json.loads(line)['step'] for line in lines[6:]] == [4, 5, 6]

  def test_a_start_without_a_checkpoint_drops_everything(self, tmp_path):
    for steps in ([1, 2], []):
      with MetricsLogger(tmp_path, first_step=0, total_steps=9) as logger:
        logger.write({'step': 0, 'valid_loss': 5.0})
        for step in steps:
          logger.write(train_row(step))
    assert [row['step'] for row in read_metrics(tmp_path / 'metrics.jsonl')] == [0]
    assert set(tensorboard(tmp_path)) == {'valid_loss', 'train_loss', 'tokens_per_second'}
    assert tensorboard(tmp_path)['train_loss'] == []
    assert len(tensorboard(tmp_path)['valid_loss']) == 1

  def test_a_kill_while_rows_are_dropped_leaves_the_file_whole(self, tmp_path, monkeypatch):
    write_steps(tmp_path, 0, [1, 2, 3])
    before = (tmp_path / 'metrics.jsonl').read_bytes()

    def kill(*_):
      raise KeyboardInterrupt

    monkeypatch.setattr(metrics.os, 'fsync', kill)
    with pytest.raises(KeyboardInterrupt):
      MetricsLogger(tmp_path, first_step=1, total_steps=9)
    assert (tmp_path / 'metrics.jsonl').read_bytes() == before

  def test_tensorboard_shows_no_step_twice(self, tmp_path):
    write_steps(tmp_path, 0, [1, 2, 3, 4, 5])
    write_steps(tmp_path, 3, [4])
    write_steps(tmp_path, 2, [3, 4])
    assert [step for step, _ in tensorboard(tmp_path)['train_loss']] == [1, 2, 3, 4]


class TestTensorBoard:
  def test_scalars_and_layers(self, tmp_path):
    with MetricsLogger(tmp_path, first_step=0, total_steps=9) as logger:
      logger.write(train_row(4, dropped_fraction=[0.0, 0.5, None], gradient_norm=math.nan))
    curves = tensorboard(tmp_path)
    assert {tag: [(step, float(value)) for step, value in c] for tag, c in curves.items()} == {
      'train_loss': [(4, 0.25)],
      'tokens_per_second': [(4, 1e5)],
      'dropped_fraction': [(4, 0.25)],
      'dropped_fraction/00': [(4, 0.0)],
      'dropped_fraction/01': [(4, 0.5)],
    }

  def test_expert_load_is_a_histogram_with_a_bucket_an_expert(self, tmp_path):
    loads = [np.float32([0.5, 0.5]), np.float32([1.0, 0.0, 0.0])]
    with MetricsLogger(tmp_path, first_step=0, total_steps=9) as logger:
      logger.write(train_row(1), expert_load=loads, layer_names=['a', 'b'])
      with pytest.raises(ValueError, match='zip'):
        logger.write(train_row(1), expert_load=loads, layer_names=['a'])
    curves = tensorboard(tmp_path)
    ((step, buckets),) = curves['expert_load/b']
    assert step == 1
    np.testing.assert_array_equal(buckets, [[0, 1, 1.0], [1, 2, 0.0], [2, 3, 0.0]])
    np.testing.assert_array_equal(curves['expert_load/a'][0][1][:, 2], loads[0])


class TestProgress:
  def run(self, tmp_path, interval=0.0):
    with MetricsLogger(
      tmp_path, first_step=0, total_steps=4, seconds_between_lines=interval
    ) as logger:
      for step in (1, 2, 3, 4):
        logger.write(train_row(step, expert_load_entropy=[1.0, 0.9], train_bits_per_byte=3.3))
      logger.write(eval_row(4))
      logger.say('done')

  def test_plain_lines_where_there_is_no_terminal(self, tmp_path, capsys):
    self.run(tmp_path)
    out, err = capsys.readouterr()
    assert out == '' and '\r' not in err
    lines = err.splitlines()
    text = '3.300 bits/byte, 100,000 tokens/s, expert balance 95%'
    assert lines[0] == f'step 1/4: loss 1.0000, {text}'
    assert lines[1] == f'step 2/4: loss 0.5000, {text}, 00:00 left'
    assert lines[3:] == [
      f'step 4/4: loss 0.2500, {text}',
      'step 4: valid loss 0.5000, 0.750 bits/byte',
      'done',
    ]

  def test_lines_keep_their_distance(self, tmp_path, capsys):
    self.run(tmp_path, interval=60.0)
    steps = [line.split(':')[0] for line in capsys.readouterr().err.splitlines()]
    assert steps == ['step 1/4', 'step 4/4', 'step 4', 'done']

  def test_nothing_where_standard_error_is_closed(self, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
      patch.setattr(sys, 'stderr', None)
      self.run(tmp_path)
    assert capsys.readouterr() == ('', '')

  def test_a_bar_on_a_terminal(self, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    monkeypatch.setenv('COLUMNS', '200')
    self.run(tmp_path)
    err = capsys.readouterr().err
    assert '\r' in err and '4/4' in err and 'loss 0.2500' in err and 'expert balance 95%' in err
    assert 'step 4: valid loss 0.5000' in err


def test_import_loads_no_tensorflow():
  program = (
    'import sys, types\n'
    'sys.modules["tensorflow"] = None\n'  # an import of it would fail
    'import ssm_moe.training.metrics\n'
    'assert "grpc" not in sys.modules\n'
  )
  subprocess.run([sys.executable, '-c', program], check=True)
