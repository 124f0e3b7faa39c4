"""How much sooner than a baseline a run reached a loss, in steps, tokens, FLOPs and seconds.

All of it is by interpolation: nothing is said of a loss that a run has not reached. Functions take
rows of metrics.jsonl, as `ssm_moe.training.metrics.read_metrics` gives them.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssm_moe.errors import UserError
from ssm_moe.shapes import Float, Int

# What a loss costs, and what rows of metrics call it.
COSTS = {'steps': 'step', 'tokens': 'tokens', 'flops': 'flops', 'seconds': 'seconds'}
# The weight that MoE-Mamba gave each new training loss (https://arxiv.org/abs/2401.04081).
PAPER_EMA_ALPHA = 1e-3
# A longer average would smooth over more than this part of a run.
_LONGEST_AVERAGE = 0.1

Row = Mapping[str, Any]


class Curve(NamedTuple):
  """Losses in the order of training.

  Attributes:
    steps: Step of the row of metrics that each point is from.
    costs: What the loss of the point was reached with, in the order of `COSTS`; positive.
    loss: Nats a token.
  """

  steps: Int[np.ndarray, 'points']
  costs: Float[np.ndarray, 'points 4']
  loss: Float[np.ndarray, 'points']


class Band(NamedTuple):
  """An entry's curve: the mean over its runs, and the least and the greatest loss."""

  mean: Curve
  low: Float[np.ndarray, 'points']
  high: Float[np.ndarray, 'points']


class Reached(NamedTuple):
  """What it took to reach a loss.

  Attributes:
    cost: In the order of `COSTS`.
    exact: False if the loss was passed before the first point: `cost` is then the most that it
      can have taken.
  """

  cost: Float[np.ndarray, '4']
  exact: bool


def valid_curve(rows: Sequence[Row]) -> Curve:
  """Returns the evaluations, as they are: each is a mean over all validation data."""
  points = _points(rows, 'valid_loss')
  return _curve(points, _costs(points), _column(points, 'valid_loss'))


def ema_alpha(num_steps: int) -> float:
  """Returns the weight of a step's loss in the average of training losses.

  It is MoE-Mamba's 0.001, an average over about 1000 steps, for runs of 10,000 steps and more; in a
  shorter run, where that would be most of it, 10 / num_steps, an average over a tenth.
  """
  return min(1.0, max(PAPER_EMA_ALPHA, 1 / (_LONGEST_AVERAGE * num_steps)))


def train_curve(rows: Sequence[Row], alpha: float) -> Curve:
  """Returns the exponential moving average of the training loss.

  A row is the mean m over the n steps since the row before. It enters as n steps of loss m would,

    s_t = (1 - alpha)^n s_{t-1} + (1 - (1 - alpha)^n) m,

  and s is divided by what its weights add up to, so that it does not start from zero.

  An average is late: it is of losses that are 1 / alpha steps old, which would draw every speed-up
  towards 1. So the costs of a point are averaged with the same weights, on a logarithmic scale: the
  point stands where its losses were measured, not at the last of them. What is left of the bias is
  the curvature inside the average: of a factor of 2 on loss ~ steps^-0.3, 1.4 % with an average
  over a tenth of the run.

  Args:
    rows: Of metrics.jsonl.
    alpha: Weight of a single step.
  """
  points = _points(rows, 'train_loss')
  ends = _costs(points)
  starts = np.concatenate([np.zeros_like(ends[:1]), ends[:-1]])
  widths = ends[:, 0] - starts[:, 0]
  # The loss of a step is that of the parameters before its update.
  middles = starts + (ends - starts) * ((widths - 1) / (2 * widths))[:, None]
  measured = (middles > 0).all(axis=1)  # else it is the loss of the untrained model
  points = [point for point, keep in zip(points, measured) if keep]
  fresh = 1 - (1 - alpha) ** widths[measured]
  values = np.column_stack([np.log(middles[measured]), _column(points, 'train_loss')])
  averages, weight, total = np.empty_like(values), 0.0, np.zeros(values.shape[1])
  for i, value in enumerate(values):
    total = (1 - fresh[i]) * total + fresh[i] * value
    weight = (1 - fresh[i]) * weight + fresh[i]
    averages[i] = total / weight
  return _curve(points, np.exp(averages[:, :-1]), averages[:, -1])


def at_steps(curve: Curve, steps: Int[np.ndarray, 'points']) -> Curve:
  """Returns the points of `curve` at these steps, which must all be among its own."""
  index = np.searchsorted(curve.steps, steps)
  return Curve(*(column[index] for column in curve))


def common_steps(curves: Sequence[Curve]) -> Int[np.ndarray, 'points']:
  """Returns the steps at which every curve has a point."""
  return functools.reduce(np.intersect1d, [curve.steps for curve in curves])


def mean_curve(curves: Sequence[Curve]) -> Curve:
  """Returns the mean of curves that have their points at the same steps."""
  steps, costs, losses = zip(*curves)
  return Curve(steps[0], np.mean(costs, axis=0), np.mean(losses, axis=0))


def reached(curve: Curve, loss: float) -> Reached | None:
  """Returns what it took until the lowest loss so far was `loss`; None if it never was.

  Between two points the lowest loss so far is taken as linear in the logarithm of the cost. For a
  power law loss ~ cost^-c that is wrong by a factor of at most about 1 + c u^2 / 8 for points a
  factor of 1 + u apart; on a linear scale it would be 1 + (c + 1) u^2 / 8.
  """
  lowest = np.minimum.accumulate(curve.loss)
  if not lowest[-1] <= loss:
    return None
  after = int(np.argmax(lowest <= loss))
  if after == 0 or lowest[after] == loss:
    return Reached(curve.costs[after], bool(lowest[after] == loss))
  part = (lowest[after - 1] - loss) / (lowest[after - 1] - lowest[after])
  before, behind = np.log(curve.costs[after - 1 : after + 1])
  return Reached(np.exp(before + part * (behind - before)), True)


def speedup(baseline: Reached | None, other: Reached | None) -> dict[str, Any] | None:
  """Returns the baseline's cost over the other's, by name of `COSTS`.

  Returns:
    Factors, and under 'at_least' whether they are lower bounds; None where one of them has not
    reached the loss, or where the baseline may have reached it with less than is known.
  """
  if baseline is None or other is None or not baseline.exact:
    return None
  factors = baseline.cost / other.cost
  return dict(zip(COSTS, map(float, factors))) | {'at_least': not other.exact}


def losses_reached(curve: Curve, most: int = 100) -> Float[np.ndarray, 'losses']:
  """Returns the losses at which `curve` was lower than ever before, from high to low.

  At most `most` of them, evenly among its points, the first and the last included.
  """
  lowest = np.unique(np.minimum.accumulate(curve.loss))[::-1]
  if len(lowest) <= most:
    return lowest
  return lowest[np.round(np.linspace(0, len(lowest) - 1, most)).astype(int)]


def spread(values: Sequence[float]) -> dict[str, Any]:
  """Returns mean, standard deviation of the sample (None for a single value), min and max."""
  values = np.asarray(values, np.float64)
  deviation = float(values.std(ddof=1)) if len(values) > 1 else None
  return {
    'mean': float(values.mean()),
    'std': deviation,
    'min': float(values.min()),
    'max': float(values.max()),
  }


def _points(rows: Sequence[Row], key: str) -> list[Row]:
  """Returns the rows with a finite loss, one a step, in the order of steps."""
  points = {row['step']: row for row in rows if row['step'] > 0 and _is_number(row.get(key))}
  for step, row in points.items():
    for name in COSTS.values():
      if not (_is_number(row.get(name)) and row[name] > 0):
        raise UserError(f'the row of step {step} in metrics.jsonl has no positive {name}')
  return [points[step] for step in sorted(points)]


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _column(points: Sequence[Row], key: str) -> Float[np.ndarray, 'points']:
  return np.asarray([point[key] for point in points], np.float64)


def _costs(points: Sequence[Row]) -> Float[np.ndarray, 'points 4']:
  return np.stack([_column(points, key) for key in COSTS.values()], axis=1)


def _curve(points, costs, loss) -> Curve:
  return Curve(np.asarray([point['step'] for point in points], np.int64), costs, loss)
