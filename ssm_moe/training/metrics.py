"""What a run reports: metrics.jsonl, TensorBoard events and progress on standard error."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from ssm_moe.errors import UserError
from ssm_moe.shapes import Float
from ssm_moe.training import durable
from ssm_moe.training.event_file import EventFile

# First in every line, in this order; other keys follow by name.
_FIRST_KEYS = ('step', 'tokens', 'flops', 'seconds', 'train_loss', 'valid_loss')
# Fractions of the assignments by layer and expert, each layer adding up to 1; a list where layers
# have different numbers of experts.
ExpertLoad = Float[np.ndarray, 'layers E'] | Sequence[Float[np.ndarray, '_']]
_TENSORBOARD_SKIPS = ('step', 'tokens', 'flops', 'seconds')


class MetricsLogger:
  """Writes rows of metrics to WORKDIR/metrics.jsonl, to WORKDIR/tensorboard and to the terminal.

  A line of metrics.jsonl is strict JSON: a number that is not finite is null. On resume, rows after
  the restored step are dropped first, and so is a last line that a kill cut short, so that a step
  is never reported twice.

  Args:
    workdir: Made if it does not exist.
    first_step: Steps done before this run; 0 drops all that an earlier run wrote.
    total_steps: Steps done at the end of the run.
    seconds_between_lines: How often a line is printed where standard error is not a terminal.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    first_step: int,
    total_steps: int,
    seconds_between_lines: float = 10.0,
  ):
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'metrics.jsonl'
    if path.exists():
      _drop_rows_after(path, first_step)
    self._path = path
    self._file = path.open('a', encoding='utf-8')
    # Rows of the restored step itself are kept, except at 0, where nothing was restored.
    hidden_from = first_step + 1 if first_step else 0
    with durable.naming(workdir / 'tensorboard'):
      self._events = EventFile(workdir / 'tensorboard', first_step=hidden_from)
    self._progress = _Progress(first_step, total_steps, seconds_between_lines)

  def __enter__(self) -> 'MetricsLogger':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(
    self,
    row: Mapping[str, Any],
    *,
    expert_load: ExpertLoad = (),
    layer_names: Sequence[str] = (),
  ) -> None:
    """Reports a training row or an evaluation row, and flushes it.

    Args:
      row: Numbers, or lists with a number a layer, by name; `step` is needed. A row with
        `valid_loss` is an evaluation.
      expert_load: For TensorBoard only.
      layer_names: One a layer; their numbers if empty.

    Raises:
      OSError: the disk is full, say; names the file.
    """
    names = layer_names or [f'{layer:02d}' for layer in range(len(expert_load))]
    order = [key for key in _FIRST_KEYS if key in row]
    plain = {key: _plain(row[key]) for key in [*order, *sorted(set(row) - set(order))]}
    with durable.naming(self._path):
      self._file.write(json.dumps(plain, allow_nan=False) + '\n')
      self._file.flush()
    bars = {f'expert_load/{name}': load for name, load in zip(names, expert_load, strict=True)}
    with durable.naming(self._path.with_name('tensorboard')):
      self._events.write(plain['step'], _scalars(plain), bars)
    self._progress.show(plain)

  def say(self, text: str) -> None:
    """Prints a line on standard error without tearing the progress bar."""
    self._progress.say(text)

  def close(self) -> None:
    self._progress.close()
    for file in (self._file, self._events):
      # What is not on the disk now, `write` has raised an error for.
      with contextlib.suppress(OSError):
        file.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the rows of a metrics.jsonl; a last line that a kill cut short is left out.

  Such a line has no line break: one that has is of another hand.

  Raises:
    UserError: there is no such file, or another line of it is no row.
  """
  return [row for _, row in _rows(pathlib.Path(path))]


class _Progress:
  """A bar on a terminal; elsewhere a line at intervals, for log files."""

  def __init__(self, first_step: int, total_steps: int, seconds_between_lines: float):
    self._total = total_steps
    self._interval = seconds_between_lines
    self._printed = -math.inf
    self._first: tuple[int, float] | None = None
    self._bar = None
    if sys.stderr is not None and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=total_steps, initial=first_step, unit='step', dynamic_ncols=True, file=sys.stderr
      )

  def say(self, text: str) -> None:
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    elif sys.stderr is not None:  # closed; `print` would take standard output instead
      print(text, file=sys.stderr, flush=True)

  def show(self, row: dict[str, Any]) -> None:
    step, now = row['step'], time.monotonic()
    text = _describe(row)
    if 'valid_loss' in row:
      self.say(f'step {step}: {text}')
      return
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    # Counted from the first row on: the time before it is mostly compilation.
    self._first = self._first or (step, now)
    if now - self._printed < self._interval and step < self._total:
      return
    self._printed = now
    left = ''
    if self._total > step > self._first[0]:
      seconds = (self._total - step) * (now - self._first[1]) / (step - self._first[0])
      left = f', {tqdm.tqdm.format_interval(seconds)} left'
    self.say(f'step {step}/{self._total}: {text}{left}')

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def _describe(row: dict[str, Any]) -> str:
  formats = {
    'train_loss': 'loss {:.4f}',
    'valid_loss': 'valid loss {:.4f}',
    'train_bits_per_byte': '{:.3f} bits/byte',
    'valid_bits_per_byte': '{:.3f} bits/byte',
    'tokens_per_second': '{:,.0f} tokens/s',
    'mfu': 'MFU {:.1%}',
    'expert_load_entropy': 'expert balance {:.0%}',
  }
  parts = []
  for key, text in formats.items():
    if key in row:
      value = _mean(row[key])
      parts.append(text.format(math.nan if value is None else value))
  return ', '.join(parts)


def _scalars(row: dict[str, Any]) -> dict[str, float]:
  """Returns the curves that TensorBoard shows: a list gives its mean and a curve a layer."""
  scalars = {}
  for key, value in row.items():
    if key in _TENSORBOARD_SKIPS:
      continue
    if isinstance(value, list):
      scalars |= {f'{key}/{layer:02d}': item for layer, item in enumerate(value)}
    scalars[key] = _mean(value)
  return {tag: value for tag, value in scalars.items() if isinstance(value, (int, float))}


def _mean(value: Any) -> Any:
  if not isinstance(value, list):
    return value
  known = [item for item in value if item is not None]
  return sum(known) / len(known) if known else None


def _plain(value: Any) -> Any:
  """Returns what strict JSON holds; float32 in its shortest spelling (0.1, not 0.10000000149)."""
  if value is None or isinstance(value, (str, bool, int)):
    return value
  array = np.asarray(value)
  if array.ndim:
    return [_plain(item) for item in array]
  if array.dtype.kind in 'iub':
    return array.item()
  number = float(str(array[()]))
  return number if math.isfinite(number) else None


def _rows(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
  """Returns each line with the row in it."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from None
  lines = data.splitlines()
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      if not isinstance(row['step'], int):
        raise TypeError
    except (ValueError, TypeError, LookupError, RecursionError):
      if number < len(lines) or data.endswith(b'\n'):
        raise UserError(f'{path}: line {number} is no row of metrics; mend or move it') from None
      break
    rows.append((line, row))
  return rows


def _drop_rows_after(path: pathlib.Path, step: int) -> None:
  kept = [line + b'\n' for line, row in _rows(path) if 0 < step >= row['step']]
  durable.write(path, b''.join(kept))
