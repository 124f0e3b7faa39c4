"""A comparison says what the curves of its runs say, and no more."""

import json

import numpy as np
import pytest

from ssm_moe.analysis import comparison, comparison_table, runs
from ssm_moe.config import ExperimentConfig, MambaConfig, ModelConfig, RoMConfig, TrainConfig
from ssm_moe.errors import UserError
from ssm_moe.models import accounting

TOKENS_PER_STEP = 512
ROUTED = {'mamba': MambaConfig(rom=RoMConfig(kind='shared'))}


def rows(last=1000, every=50, *, speed=1.0, slowness=1.0, offset=0.0):
  """A power law, and training losses without noise."""
  found = []
  for step in range(10, last + 1, 10):
    tokens = TOKENS_PER_STEP * step
    costs = {'step': step, 'tokens': tokens, 'flops': 1e6 * tokens, 'seconds': slowness * step / 4}
    loss = 1.0 + offset + 4.0 * (speed * step) ** -0.3
    found.append(costs | {'train_loss': loss})
    if step % every == 0:
      # 2 bytes a token.
      found.append(costs | {'valid_loss': loss, 'valid_bits_per_byte': loss / np.log(2) / 2})
  return found


def run(name, curve, *, seed=0, **model):
  config = ExperimentConfig(model=ModelConfig(**model), train=TrainConfig(seed=seed))
  return name, runs.Run(folder=f'runs/{name}_{seed}', config=config, rows=curve)


def compare(*named, loss='valid'):
  return comparison.compare(runs.group(named), loss)


def table_rows(report):
  lines = comparison_table.markdown(report).splitlines()
  cells = [[c.strip() for c in line[1:-1].split(' | ')] for line in lines if line[:1] == '|']
  assert len({len(row) for row in cells[2:]} | {len(cells[0])}) == 1
  return [dict(zip(cells[0], row)) for row in cells[2:]]


def test_a_faster_run_is_so_by_every_cost():
  report = compare(
    run('dense', rows()), run('routed', rows(speed=2.0, slowness=1.25), **ROUTED)
  ).report
  assert (report['baseline'], report['loss'], report['warnings']) == ('dense', 'valid_loss', [])
  dense, routed = report['entries']
  assert report['target_loss'] == dense['final_loss']['mean'] == 1.0 + 4.0 * 1000**-0.3
  expected = {'steps': 2.0, 'tokens': 2.0, 'flops': 2.0, 'seconds': 1.6, 'at_least': False}
  assert routed['speedup'] == pytest.approx(expected)
  assert routed['speedup_of_runs'] == [pytest.approx(expected)]
  # Points lie 50 steps apart: at the losses of the second half, from step 500 on, the other is at
  # step 250 or later, and u = log(steps) advances by at most 0.2 from point to point.
  half = routed['speedup_in_second_half']
  assert (half['losses'], half['known']) == (11, 11)
  assert half['tokens']['min'] == pytest.approx(2.0, rel=0.3 * 0.2**2 / 8)
  assert half['tokens']['max'] == pytest.approx(2.0, rel=0.3 * 0.2**2 / 8)
  assert dense['speedup'] == dict.fromkeys(expected, 1.0) | {'at_least': False}
  costs = accounting.account(ModelConfig(**ROUTED), sequence_length=8)
  assert (routed['active_params'], routed['total_params']) == (
    costs['active_params'],
    costs['total_params'],
  )
  assert routed['seconds_per_step'] == pytest.approx(1.25 / 4)
  assert routed['tokens_per_second'] == pytest.approx(TOKENS_PER_STEP * 4 / 1.25)
  assert routed['bits_per_byte']['mean'] == pytest.approx(
    routed['final_loss']['mean'] / np.log(2) / 2
  )


def test_each_loss_of_the_baseline_has_its_costs():
  report = compare(run('dense', rows()), run('slow', rows(speed=0.5), d_model=64)).report
  by_loss = report['entries'][1]['by_loss']
  assert [at['baseline_cost']['steps'] for at in by_loss] == pytest.approx(range(50, 1001, 50))
  for at in by_loss:
    if at['baseline_cost']['steps'] <= 500:
      assert at['cost']['steps'] == pytest.approx(2 * at['baseline_cost']['steps'], rel=0.02)
      assert at['cost']['tokens'] == pytest.approx(TOKENS_PER_STEP * at['cost']['steps'])
    else:
      assert at['cost'] is None and at['speedup'] is None


def test_a_loss_never_reached_is_said_and_not_guessed():
  report = compare(run('dense', rows()), run('slow', rows(speed=0.5), d_model=64)).report
  slow = report['entries'][1]
  assert slow['speedup'] is None
  # The other way round both have been there: the baseline at step 500.
  assert slow['speedup_at_own_lowest_loss']['tokens'] == pytest.approx(0.5)
  json.dumps(report, allow_nan=False)
  table = table_rows(report)[1]
  assert {table[f'Speed-up in {cost}'] for cost in ('steps', 'tokens', 'FLOPs', 'seconds')} == {'-'}
  text = comparison_table.markdown(report)
  assert (
    '- slow: never reached valid loss 1.5036; its best is 1.6200, which the baseline reached with '
    '0.50 times the tokens.'
  ) in text


def test_seeds_give_a_mean_and_a_spread():
  offsets = {0: -0.02, 1: 0.0, 2: 0.02}
  found = compare(
    *(run('dense', rows(offset=x), seed=seed) for seed, x in offsets.items()),
    *(run('fast', rows(speed=2.0, offset=x), seed=s, d_model=64) for s, x in offsets.items()),
  )
  dense, fast = found.report['entries']
  assert [r['seed'] for r in dense['runs']] == [0, 1, 2]
  middle = 1.0 + 4.0 * 1000**-0.3
  assert dense['final_loss'] == pytest.approx(
    {'mean': middle, 'std': 0.02, 'min': middle - 0.02, 'max': middle + 0.02}
  )
  # Each seed against the mean of the baseline: its lucky seed is faster than itself, its unlucky
  # one never gets there.
  assert dense['speedup']['steps'] == pytest.approx(1.0)
  assert dense['speedup_of_runs'][0]['steps'] > 1.1
  assert dense['speedup_of_runs'][2] is None
  assert fast['speedup']['steps'] == pytest.approx(2.0)
  band = found.bands['dense']
  np.testing.assert_allclose(band.high - band.low, 0.04)
  cells = table_rows(found.report)
  assert cells[0]['Seeds'] == '3'
  assert cells[0]['Valid loss'] == '1.5036 +- 0.0200'
  assert cells[0]['Speed-up in steps'].startswith('1.00 (- to 1.')
  assert cells[1]['Speed-up in tokens'].startswith('2.00 (1.')


def test_an_unfinished_seed_is_compared_as_far_as_it_went():
  report = compare(
    run('dense', rows()), run('dense', rows(last=500), seed=1), run('fast', rows(speed=2.0))
  ).report
  dense, fast = report['entries']
  assert (dense['steps'], dense['tokens']) == (500, 500 * TOKENS_PER_STEP)
  assert dense['final_loss']['mean'] == report['target_loss'] == 1.0 + 4.0 * 500**-0.3
  assert fast['speedup']['steps'] == pytest.approx(2.0)
  unfinished, lengths, tokens = report['warnings']
  assert unfinished.startswith('runs/dense_1 is not finished: 500 of 1000 steps')
  assert lengths.startswith('dense has runs of different lengths')
  assert tokens.endswith('dense 256,000, fast 512,000')


def test_the_training_loss_is_compared_as_its_average():
  named = run('dense', rows()), run('fast', rows(speed=2.0, slowness=2.0), d_model=64)
  report = compare(*named, loss='train').report
  assert (report['loss'], report['ema_alpha']) == ('train_loss', pytest.approx(0.01))
  fast = report['entries'][1]
  # speedup_test.py derives the bias of the average; here it is the shape that counts.
  assert fast['speedup']['tokens'] == pytest.approx(2.0, rel=0.05)
  assert fast['speedup']['seconds'] == pytest.approx(1.0, rel=0.05)
  assert fast['bits_per_byte'] is None  # the rows do not tell
  assert 'moving average with alpha 0.01' in comparison_table.markdown(report)


def test_few_evaluations_bound_and_are_warned_of():
  report = compare(
    run('dense', rows()), run('fast', rows(every=500, speed=10.0), d_model=64)
  ).report
  assert report['warnings'] == ['fast has 2 points of valid loss: its speed-ups are rough']
  assert report['entries'][1]['speedup']['at_least'] is True
  assert table_rows(report)[1]['Speed-up in steps'] == '>= 2.00'


def test_a_single_evaluation_gives_final_losses():
  report = compare(
    run('dense', rows(every=1000)), run('slow', rows(every=1000, speed=0.5), d_model=64)
  ).report
  assert report['entries'][1]['final_loss']['mean'] == pytest.approx(1.0 + 4.0 * 500**-0.3)
  assert report['entries'][1]['speedup'] is None
  last = comparison_table.markdown(report).splitlines()[-1]
  assert last == '- slow: never reached valid loss 1.5036; its best is 1.6200.'


def test_a_run_against_itself_is_as_fast_everywhere():
  report = compare(run('one', rows()), run('two', rows())).report
  one, two = report['entries']
  assert {at['speedup']['tokens'] for at in two['by_loss']} == {1.0}
  assert two['speedup_in_second_half']['seconds'] == {
    'mean': 1.0,
    'std': 0.0,
    'min': 1.0,
    'max': 1.0,
  }
  assert {**one, 'name': '', 'runs': []} == {**two, 'name': '', 'runs': []}


@pytest.mark.parametrize(
  ('curve', 'loss', 'message'),
  [
    ([], 'valid', r'^runs/x_0: metrics\.jsonl has no rows yet$'),
    (rows(every=9999), 'valid', r'^runs/x_0: .* has no evaluation yet; .* give --loss=train$'),
    (
      rows(every=10)[1::2],
      'train',
      r'^runs/x_0: .* has no training loss yet; .* give --loss=valid$',
    ),
    (
      [{'step': 1, 'valid_loss': 2.0}],
      'valid',
      r'^runs/x_0: the row of step 1 .* positive tokens$',
    ),
  ],
)
def test_a_run_without_the_loss_is_named(curve, loss, message):
  with pytest.raises(UserError, match=message):
    compare(run('x', curve), loss=loss)


def test_seeds_without_a_common_step_are_named():
  with pytest.raises(UserError, match='x: no step has a loss in all of runs/x_0, runs/x_1'):
    compare(run('x', rows(last=100, every=40)), run('x', rows(last=100, every=50), seed=1))
