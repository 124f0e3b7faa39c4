"""A comparison of runs as Markdown."""

from typing import Any

from ssm_moe.analysis.speedup import COSTS

_COST_WORDS = {'steps': 'steps', 'tokens': 'tokens', 'flops': 'FLOPs', 'seconds': 'seconds'}


def markdown(report: dict[str, Any]) -> str:
  """Returns the report as a table, and below it what the table cannot say."""
  loss = report['loss'].replace('_', ' ')
  head = [
    'Entry',
    'Seeds',
    'Active / total parameters',
    'Tokens',
    loss.capitalize(),
    'Bits per byte',
    's/step',
    'Tokens/s',
    *(f'Speed-up in {_COST_WORDS[name]}' for name in COSTS),
  ]
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * 2 + '|---:' * (len(head) - 2) + '|']
  lines += ['| ' + ' | '.join(_cells(entry)) + ' |' for entry in report['entries']]
  target, baseline = report['target_loss'], report['baseline']
  lines += [
    '',
    f'Speed-up: what {baseline} needed to reach {loss} {target:.4f}, its last, over what the entry '
    'needed; -: never reached. In brackets the least and the greatest of the seeds, each against '
    'the mean of the baseline. +- is the standard deviation over seeds.',
  ]
  if report['ema_alpha']:
    lines[-1] += f' The training loss is a moving average with alpha {report["ema_alpha"]:.3g}.'
  others = report['entries'][1:]
  lines += [''] * bool(others)
  lines += [f'- {entry["name"]}: {_sentence(entry, loss, target)}' for entry in others]
  return '\n'.join(lines)


def _cells(entry: dict[str, Any]) -> list[str]:
  speed, bits = entry['tokens_per_second'], entry['bits_per_byte']
  return [
    entry['name'].replace('|', '\\|'),
    str(len(entry['runs'])),
    f'{entry["active_params"]:,} / {entry["total_params"]:,}',
    f'{entry["tokens"]:,}',
    _spread(entry['final_loss'], 4),
    _spread(bits, 3) if bits else '-',
    f'{entry["seconds_per_step"]:.3g}',
    f'{speed:,.0f}' if speed else '-',
    *(_speedup_cell(entry, name) for name in COSTS),
  ]


def _spread(values: dict[str, Any], digits: int) -> str:
  mean = f'{values["mean"]:.{digits}f}'
  return mean if values['std'] is None else f'{mean} +- {values["std"]:.{digits}f}'


def _speedup_cell(entry: dict[str, Any], name: str) -> str:
  def show(speedup):
    return '-' if speedup is None else f'{">= " * speedup["at_least"]}{speedup[name]:.2f}'

  runs = sorted(entry['speedup_of_runs'], key=lambda factors: factors[name] if factors else 0.0)
  several = len(runs) > 1 and runs[-1] is not None
  of_runs = f' ({show(runs[0])} to {show(runs[-1])})' if several else ''
  return show(entry['speedup']) + of_runs


def _sentence(entry: dict[str, Any], loss: str, target: float) -> str:
  half, own = entry['speedup_in_second_half'], entry['speedup_at_own_lowest_loss']
  if entry['lowest_loss'] > target:
    text = f'never reached {loss} {target:.4f}; its best is {entry["lowest_loss"]:.4f}'
    if own:
      text += f', which the baseline reached with {own["tokens"]:.2f} times the tokens'
  elif entry['speedup'] is None:
    text = f'no speed-up can be told at {loss} {target:.4f}, since the baseline had been lower'
  else:
    at_least = 'at least ' * entry['speedup']['at_least']
    text = f'speed-up {at_least}{entry["speedup"]["tokens"]:.2f} in tokens'
    never = sum(run['lowest_loss'] > target for run in entry['runs'])
    if never:
      text += f', of the mean of its seeds; {never} of {len(entry["runs"])} never got there'
  if not half['known']:
    return text + '.'
  low, high = (f'{half["tokens"][end]:.2f}' for end in ('min', 'max'))
  return (
    f'{text}. At the losses of the second half of the baseline, speed-up '
    f'{low if low == high else f"{low} to {high}"} in tokens ({half["known"]} of {half["losses"]} '
    'losses reached).'
  )
