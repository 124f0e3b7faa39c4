"""Runs side by side: what each entry reached, with its spread over seeds, and at what cost."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ssm_moe.analysis import runs, speedup
from ssm_moe.analysis.runs import Entry, Loss, Run
from ssm_moe.analysis.speedup import COSTS, Band, Curve
from ssm_moe.errors import UserError
from ssm_moe.models import accounting

# With fewer evaluations, what is read off between them is rough.
_FEW_POINTS = 5


class Comparison(NamedTuple):
  """What `compare` found.

  Attributes:
    report: All figures, as JSON holds them.
    bands: By name of the entry.
  """

  report: dict[str, Any]
  bands: dict[str, Band]


def compare(entries: Sequence[Entry], loss: Loss = 'valid') -> Comparison:
  """Compares each entry with the first, the baseline.

  An entry's curve is the mean over its runs at the steps that all of them have; its figures are of
  the last of these steps. Speed-ups are what the mean of the baseline needed to reach a loss over
  what the entry needed.

  Args:
    entries: At least one.
    loss: 'valid' for evaluations, 'train' for the moving average of the training loss.

  Raises:
    UserError: a run has no such loss, or seeds have no step in common.
  """
  steps = max((row['step'] for run in entries[0].runs for row in run.rows), default=1)
  alpha = speedup.ema_alpha(max(steps, 1)) if loss == 'train' else None
  warnings, bands, reports = [], {}, []
  for entry in entries:
    curves = [_run_curve(run, alpha) for run in entry.runs]
    band, curves = _band(entry, curves)
    bands[entry.name] = band
    baseline = bands[entries[0].name].mean
    warnings += runs.warnings(entry, entries[0], loss)
    if len(band.mean.steps) < _FEW_POINTS:
      warnings.append(
        f'{entry.name} has {len(band.mean.steps)} points of {loss} loss: its speed-ups are rough'
      )
    reports.append(_figures(entry, curves, loss) | _speedups(band.mean, curves, baseline))
  tokens = {report['tokens'] for report in reports}
  if len(tokens) > 1:
    warnings.append(
      'entries have different numbers of tokens, and final losses are not at equal tokens: '
      + ', '.join(f'{report["name"]} {report["tokens"]:,}' for report in reports)
    )
  report = {
    'baseline': entries[0].name,
    'loss': f'{loss}_loss',
    'ema_alpha': alpha,
    'target_loss': float(baseline.loss[-1]),
    'warnings': warnings,
    'entries': reports,
  }
  return Comparison(report, bands)


def _run_curve(run: Run, alpha: float | None) -> Curve:
  if not run.rows:
    raise UserError(f'{run.folder}: metrics.jsonl has no rows yet')
  try:
    curve = speedup.valid_curve(run.rows) if alpha is None else speedup.train_curve(run.rows, alpha)
  except UserError as error:
    raise UserError(f'{run.folder}: {error}') from None
  if not len(curve.steps):
    what, other = ('evaluation', 'train') if alpha is None else ('training loss', 'valid')
    key = 'valid_loss' if alpha is None else 'train_loss'
    if any(key in row for row in run.rows):
      raise UserError(f'{run.folder}: no {key} in metrics.jsonl is a finite number')
    raise UserError(
      f'{run.folder}: metrics.jsonl has no {what} yet; wait for one, or give --loss={other}'
    )
  return curve


def _band(entry: Entry, curves: Sequence[Curve]) -> tuple[Band, list[Curve]]:
  """Returns the entry's band and its curves, all at their common steps."""
  steps = speedup.common_steps(curves)
  if not len(steps):
    folders = ', '.join(run.folder for run in entry.runs)
    raise UserError(f'{entry.name}: no step has a loss in all of {folders}')
  curves = [speedup.at_steps(curve, steps) for curve in curves]
  losses = np.stack([curve.loss for curve in curves])
  return Band(speedup.mean_curve(curves), losses.min(axis=0), losses.max(axis=0)), curves


def _figures(entry: Entry, curves: Sequence[Curve], loss: Loss) -> dict[str, Any]:
  """Returns what the entry is and where it ended."""
  account = accounting.account(
    entry.runs[0].config.model, entry.runs[0].config.train.sequence_length
  )
  last = int(curves[0].steps[-1])
  key = f'{loss}_loss'
  ends = [
    next(row for row in reversed(run.rows) if row['step'] == last and row.get(key) is not None)
    for run in entry.runs
  ]
  bits = [
    # The same ratio for a row and for a mean of rows: nats a token to bits a byte.
    float(curve.loss[-1]) * end[f'{loss}_bits_per_byte'] / end[key]
    for curve, end in zip(curves, ends)
    if end.get(f'{loss}_bits_per_byte') and end[key]
  ]
  seconds = float(np.mean([end['seconds'] for end in ends]))
  return {
    'name': entry.name,
    'runs': [
      {
        'folder': run.folder,
        'seed': run.config.train.seed,
        'final_loss': float(curve.loss[-1]),
        'lowest_loss': float(curve.loss.min()),
        'seconds': end['seconds'],
      }
      for run, curve, end in zip(entry.runs, curves, ends)
    ],
    'active_params': account['active_params'],
    'total_params': account['total_params'],
    'steps': last,
    'tokens': ends[0]['tokens'],
    'flops': ends[0]['flops'],
    'seconds': seconds,
    'seconds_per_step': seconds / last,
    'tokens_per_second': ends[0]['tokens'] / seconds if seconds else None,
    'final_loss': speedup.spread([curve.loss[-1] for curve in curves]),
    'lowest_loss': float(speedup.mean_curve(curves).loss.min()),
    'bits_per_byte': speedup.spread(bits) if len(bits) == len(ends) else None,
  }


def _speedups(curve: Curve, curves: Sequence[Curve], baseline: Curve) -> dict[str, Any]:
  """Returns speed-ups at the baseline's final loss and at each loss that it reached."""
  target = float(baseline.loss[-1])
  cost = speedup.reached(baseline, target)
  by_loss = []
  for loss in map(float, speedup.losses_reached(baseline)):
    there, here = speedup.reached(baseline, loss), speedup.reached(curve, loss)
    by_loss.append(
      {
        'loss': loss,
        'cost': here and dict(zip(COSTS, map(float, here.cost))) | {'at_most': not here.exact},
        'baseline_cost': dict(zip(COSTS, map(float, there.cost))),
        'speedup': speedup.speedup(there, here),
      }
    )
  # Before that, both are still warming up.
  half = baseline.costs[-1, 0] / 2
  own = float(curve.loss.min())
  later = [at for at in by_loss if at['baseline_cost']['steps'] >= half]
  exact = [at['speedup'] for at in later if at['speedup'] and not at['speedup']['at_least']]
  return {
    'speedup': speedup.speedup(cost, speedup.reached(curve, target)),
    'speedup_of_runs': [speedup.speedup(cost, speedup.reached(run, target)) for run in curves],
    'speedup_at_own_lowest_loss': speedup.speedup(
      speedup.reached(baseline, own), speedup.reached(curve, own)
    ),
    'speedup_in_second_half': {
      'losses': len(later),
      'known': len(exact),
      **{name: speedup.spread([s[name] for s in exact]) if exact else None for name in COSTS},
    },
    'by_loss': by_loss,
  }
