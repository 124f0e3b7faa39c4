"""Speed-ups of curves whose ratio is known."""

import numpy as np
import pytest

from ssm_moe.analysis import speedup
from ssm_moe.errors import UserError

TOKENS_PER_STEP, FLOPS_PER_TOKEN, SECONDS_PER_STEP = 512, 1e6, 0.25
EXPONENT = 0.3


def row(step, *, slowness=1.0, **losses):
  tokens = TOKENS_PER_STEP * step
  return {
    'step': step,
    'tokens': tokens,
    'flops': FLOPS_PER_TOKEN * tokens,
    'seconds': slowness * SECONDS_PER_STEP * step,
  } | losses


def power_law(steps, speed=1.0):
  return 1.0 + 4.0 * (speed * np.asarray(steps, np.float64)) ** -EXPONENT


def valid_rows(last, every, *, speed=1.0, slowness=1.0):
  steps = range(every, last + 1, every)
  return [row(s, slowness=slowness, valid_loss=float(power_law(s, speed))) for s in steps]


def train_rows(last, every, *, speed=1.0, noise=0.0, seed=0):
  """Rows as training writes them: the loss of step s is that of the parameters after s - 1."""
  losses = power_law(np.maximum(np.arange(last), 0.5), speed)
  losses = losses + noise * np.random.default_rng(seed).normal(size=last)
  ends = [*range(every, last, every), last]
  return [
    row(end, train_loss=float(losses[start:end].mean())) for start, end in zip([0, *ends], ends)
  ]


def factors(baseline, other, loss=None):
  loss = baseline.loss[-1] if loss is None else loss
  return speedup.speedup(speedup.reached(baseline, loss), speedup.reached(other, loss))


def test_a_run_at_twice_the_speed_is_twice_as_fast():
  # It has a point at exactly half the steps: nothing is left to interpolate.
  found = factors(
    speedup.valid_curve(valid_rows(1000, 50)),
    speedup.valid_curve(valid_rows(1000, 50, speed=2.0, slowness=1.25)),
  )
  assert found == pytest.approx(
    {'steps': 2.0, 'tokens': 2.0, 'flops': 2.0, 'seconds': 2.0 / 1.25, 'at_least': False}
  )


@pytest.mark.parametrize('every', [7, 30, 90, 300])
@pytest.mark.parametrize('speed', [0.8, 1.1, 2.0, 3.3])
def test_between_points_the_error_is_that_of_interpolation(every, speed):
  baseline = speedup.valid_curve(valid_rows(1000, 50))
  other = speedup.valid_curve(valid_rows(2000, every, speed=speed))
  factor = factors(baseline, other)['tokens']
  # In u = log(steps) the loss is a exp(-c u) + b. A chord over du is off by at most du^2 / 8 times
  # the second derivative, c^2 a exp(-c u): in u, by at most that over the least slope.
  after = int(np.searchsorted(other.steps, 1000 / speed))
  du = np.log(other.steps[after] / other.steps[after - 1])
  allowed = EXPONENT * du**2 / 8 * np.exp(EXPONENT * du)
  assert abs(np.log(factor / speed)) <= allowed + 1e-9
  assert allowed < 0.1


@pytest.mark.parametrize(('loss', 'every'), [('valid', 40), ('train', 10)])
def test_a_run_against_itself_is_exactly_as_fast(loss, every):
  if loss == 'valid':
    curve = speedup.valid_curve(valid_rows(1000, every))
  else:
    curve = speedup.train_curve(train_rows(1000, every, noise=0.3), speedup.ema_alpha(1000))
  for target in speedup.losses_reached(curve):
    assert factors(curve, curve, target) == dict.fromkeys(speedup.COSTS, 1.0) | {'at_least': False}


def test_a_loss_never_reached_has_no_speedup():
  baseline = speedup.valid_curve(valid_rows(1000, 50))
  slower = speedup.valid_curve(valid_rows(1000, 50, speed=0.5))
  assert speedup.reached(slower, baseline.loss[-1]) is None
  assert factors(baseline, slower) is None
  # Where both have been, it has.
  assert factors(baseline, slower, slower.loss[-1])['steps'] == pytest.approx(0.5)


def test_a_loss_passed_before_the_first_point_gives_a_bound():
  baseline = speedup.valid_curve(valid_rows(1000, 50))
  faster = speedup.valid_curve(valid_rows(1000, 250, speed=10.0))  # reaches it at step 100
  assert factors(baseline, faster) == pytest.approx(
    {'steps': 4.0, 'tokens': 4.0, 'flops': 4.0, 'seconds': 4.0, 'at_least': True}
  )
  # What the baseline needed for it is not known: neither is the factor, nor a bound.
  assert factors(faster, baseline, baseline.loss[-1]) is None
  # At the very loss of the first point, nothing is in doubt.
  assert factors(baseline, faster, faster.loss[0]) is None
  assert speedup.reached(faster, faster.loss[0]).exact


def test_what_counts_is_when_a_loss_was_first_reached():
  losses = [5.0, 3.0, 4.0, 2.0, 2.5]
  curve = speedup.valid_curve([row(s, valid_loss=x) for s, x in enumerate(losses, 1)])
  assert speedup.reached(curve, 3.0).cost[0] == 2.0
  # 2.5 lies half-way between 3.0, the lowest loss up to step 3, and 2.0, that up to step 4.
  assert speedup.reached(curve, 2.5).cost[0] == pytest.approx(np.sqrt(3 * 4))
  assert speedup.losses_reached(curve).tolist() == [5.0, 3.0, 2.0]


def test_rows_without_the_loss_and_of_the_untrained_model_are_left_out():
  rows = [
    row(0, valid_loss=9.0),
    row(2, valid_loss=3.0),
    row(1, train_loss=4.0),
    row(1, valid_loss=None),
    row(2, valid_loss=2.5),  # of an evaluation done again
    row(1, valid_loss=4.0),
  ]
  curve = speedup.valid_curve(rows)
  assert (curve.steps.tolist(), curve.loss.tolist()) == ([1, 2], [4.0, 2.5])
  assert len(speedup.valid_curve([]).steps) == len(speedup.train_curve([], 0.1).steps) == 0


@pytest.mark.parametrize('seconds', [None, 0.0, 'x', float('nan')])
def test_a_row_without_a_cost_is_named(seconds):
  with pytest.raises(UserError, match=r'step 3 in .* has no positive seconds'):
    speedup.valid_curve([row(3, valid_loss=2.0) | {'seconds': seconds}])


def test_the_average_of_steps_is_the_plain_formula():
  rows = train_rows(6, 1)
  curve = speedup.train_curve(rows, 0.25)
  # The first row is the loss of the untrained model, and stands at no cost.
  assert curve.steps.tolist() == [2, 3, 4, 5, 6]
  average = weight = position = 0.0
  for step, loss, cost in zip(curve.steps, curve.loss, curve.costs):
    average = 0.75 * average + 0.25 * rows[step - 1]['train_loss']
    position = 0.75 * position + 0.25 * np.log(step - 1)
    weight = 0.75 * weight + 0.25
    assert loss == pytest.approx(average / weight)
    assert cost[0] == pytest.approx(np.exp(position / weight))


def test_a_row_of_many_steps_weighs_as_much_as_its_steps():
  # Losses that are constant between rows: the rows' width makes no difference.
  losses = np.repeat([4.0, 3.0, 3.5, 2.0], 30)
  single = [row(s, train_loss=float(x)) for s, x in enumerate(losses, 1)]
  wide = [row(s, train_loss=float(losses[s - 1])) for s in (30, 60, 70, 90, 120)]
  fine, coarse = (speedup.train_curve(rows, 0.01) for rows in (single, wide))
  # All but for the untrained model's row, which only one of them has alone.
  weight = 0.01 * 0.99**119 / (1 - 0.99**120)
  expected = (fine.loss[-1] * (1 - weight)) + 4.0 * weight
  assert coarse.loss[-1] == pytest.approx(expected)
  assert coarse.steps.tolist() == [30, 60, 70, 90, 120]


def test_the_average_is_of_a_tenth_of_a_run_and_never_of_more_than_1000_steps():
  assert speedup.ema_alpha(150_000) == speedup.ema_alpha(10_000) == 0.001
  assert speedup.ema_alpha(350) == pytest.approx(10 / 350)
  assert speedup.ema_alpha(3) == 1.0


def variance_of_log_steps(last, alpha):
  """Of the steps 1 to `last`, weighted as a moving average does."""
  u = np.log(np.arange(1, last + 1))
  weights = (1 - alpha) ** np.arange(last)[::-1]
  mean = np.average(u, weights=weights)
  return np.average((u - mean) ** 2, weights=weights)


@pytest.mark.parametrize(('every', 'other_every'), [(10, 10), (10, 37), (50, 3)])
def test_averages_of_training_losses_give_the_ratio(every, other_every):
  last, alpha = 4000, speedup.ema_alpha(4000)
  baseline = speedup.train_curve(train_rows(last, every), alpha)
  other = speedup.train_curve(train_rows(last, other_every, speed=2.0), alpha)
  # An average with weights of variance v in u = log(steps) lifts the loss by v / 2 times its second
  # derivative, as if it were c v / 2 later in u. Twice that for the higher moments and for rows.
  target = speedup.reached(other, baseline.loss[-1]).cost[0]
  index = int(np.searchsorted(other.costs[:, 0], target))
  ends = (int(baseline.steps[-1]), int(other.steps[index]))
  variances = [variance_of_log_steps(end, alpha) for end in ends]
  allowed = 2 * EXPONENT / 2 * (variances[1] - variances[0])
  assert allowed < 0.025
  assert abs(np.log(factors(baseline, other)['tokens'] / 2.0)) < allowed
  # An average that stays where its last loss is would be off by far more.
  late = speedup.Curve(other.steps, np.stack([other.steps] * 4, axis=1) * 1.0, other.loss)
  late_baseline = baseline._replace(costs=np.stack([baseline.steps] * 4, axis=1) * 1.0)
  assert abs(np.log(factors(late_baseline, late)['tokens'] / 2.0)) > 2 * allowed


def test_noise_averages_out():
  last, alpha, noise = 4000, speedup.ema_alpha(4000), 0.05
  found = [
    factors(
      speedup.train_curve(train_rows(last, 10, noise=noise, seed=seed), alpha),
      speedup.train_curve(train_rows(last, 10, speed=2.0, noise=noise, seed=100 + seed), alpha),
    )['tokens']
    for seed in range(20)
  ]
  # The average of 1 / alpha steps has a deviation of noise sqrt(alpha / 2), which the slope of the
  # loss in u turns into one of log(steps); two runs, and the least of correlated noise on top.
  slope = EXPONENT * (power_law(last) - 1.0)
  deviation = noise * np.sqrt(alpha / 2) / slope * np.sqrt(2)
  assert abs(np.mean(np.log(found)) - np.log(2.0)) < 2 * deviation
  assert np.std(np.log(found)) < 2 * deviation


def test_the_mean_of_seeds_is_taken_at_their_common_steps():
  curves = [
    speedup.valid_curve([row(s, slowness=slow, valid_loss=x + s) for s in steps])
    for slow, x, steps in ((1.0, 1.0, (10, 20, 30)), (3.0, 2.0, (5, 10, 20)))
  ]
  steps = speedup.common_steps(curves)
  mean = speedup.mean_curve([speedup.at_steps(curve, steps) for curve in curves])
  assert mean.steps.tolist() == [10, 20]
  assert mean.loss.tolist() == [11.5, 21.5]
  assert mean.costs[:, 0].tolist() == [10, 20]
  assert mean.costs[:, 3].tolist() == [5.0, 10.0]


def test_losses_are_thinned_with_both_ends_kept():
  curve = speedup.valid_curve(valid_rows(1000, 1))
  losses = speedup.losses_reached(curve, most=10)
  assert len(losses) == 10
  assert (losses[0], losses[-1]) == (curve.loss[0], curve.loss[-1])
  assert (np.diff(losses) < 0).all()


def test_the_spread_of_a_single_value_has_no_deviation():
  assert speedup.spread([2.0]) == {'mean': 2.0, 'std': None, 'min': 2.0, 'max': 2.0}
  assert speedup.spread([1.0, 3.0]) == pytest.approx(
    {'mean': 2.0, 'std': np.sqrt(2.0), 'min': 1.0, 'max': 3.0}
  )
