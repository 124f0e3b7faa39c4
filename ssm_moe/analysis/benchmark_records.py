"""One measured pass or step, as JSON keeps it and as a table shows it."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ssm_moe import command_line
from ssm_moe.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """One measured pass of one implementation.

  Attributes:
    name: Of the op, or of the config.
    shape, dtype: Of the data; for people.
    implementation: Its name; 'limit' is what the machine could reach at best.
    pass_: forward, backward, forward_backward or train_step.
    median_ms, min_ms, max_ms: Over the repeats.
    relative_error: Largest error over what the pass gives (values, gradients, or both), relative to
      the largest magnitude of the same array; None if unchecked.
    tokens_per_second: At the median; None for what has no tokens.
    peak_bytes: Arguments, results and temporaries of the compiled pass; None if unknown.
    temp_bytes: Temporaries alone. Those of the backward pass do not include what the forward pass
      keeps for it; those of forward_backward do.
    device: Its kind.
    jax, commit: Version of JAX, and of this code.
  """

  name: str
  shape: str
  dtype: str
  implementation: str
  # `pass` is a keyword of Python; `as_dict` gives it its name.
  pass_: str
  median_ms: float
  min_ms: float
  max_ms: float
  relative_error: float | None
  tokens_per_second: float | None
  peak_bytes: int | None
  temp_bytes: int | None
  device: str
  jax: str
  commit: str

  def as_dict(self) -> dict[str, Any]:
    return {key.rstrip('_'): value for key, value in dataclasses.asdict(self).items()}


def make_record(
  times: Sequence[float],
  *,
  tokens: int | None,
  relative_error: float | None = None,
  peak_bytes: int | None = None,
  temp_bytes: int | None = None,
  **described: Any,
) -> Record:
  """Returns the record of `times`, in milliseconds, made here and now."""
  median = float(np.median(times))
  return Record(
    **described,
    median_ms=median,
    min_ms=float(min(times)),
    max_ms=float(max(times)),
    relative_error=relative_error,
    tokens_per_second=None if tokens is None else 1e3 * tokens / median,
    peak_bytes=peak_bytes,
    temp_bytes=temp_bytes,
    device=device_name(),
    jax=jax.__version__,
    commit=commit(),
  )


# What makes two records those of one measurement, taken again.
_KEY = ('name', 'shape', 'dtype', 'implementation', 'pass', 'device')


def read(flag: str, path: str | os.PathLike | None) -> list[dict[str, Any]]:
  """Returns the records of a file that `write` is to add to; none if there is no file.

  Raises:
    UserError: the file is something else, or cannot be written.
  """
  if path is None:
    return []
  command_line.check_output(flag, path)
  path = pathlib.Path(path)
  if not path.exists():
    return []
  try:
    records = json.loads(path.read_text())
    if not all(set(_KEY) <= set(record) for record in records):
      raise ValueError
  except (ValueError, TypeError) as error:
    raise UserError(
      f'--{flag}={path}: there is a file that is no list of records; give another name'
    ) from error
  return records


def write(
  path: str | os.PathLike | None, earlier: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]
) -> None:
  """Writes what was there, each record in its newest form, then what is new."""
  if path is None or not new:
    return
  newest = {tuple(record[key] for key in _KEY): record for record in (*earlier, *new)}
  pathlib.Path(path).write_text(json.dumps(list(newest.values()), indent=2) + '\n')


def table(records: Sequence[Record]) -> str:
  """Returns the records as lines of aligned columns; last, the part of the limit's speed."""
  limits = {
    (r.name, r.shape, r.dtype, r.pass_): r.median_ms for r in records if r.implementation == 'limit'
  }
  head = ('op', 'shape', 'dtype', 'implementation', 'pass')
  head += ('median ms', 'min', 'max', 'MiB', 'tokens/s', 'error', 'of limit')
  rows = []
  for r in records:
    limit = limits.get((r.name, r.shape, r.dtype, r.pass_))
    rows.append(
      (
        *(r.name, r.shape, r.dtype, r.implementation, r.pass_),
        *map(_milliseconds, (r.median_ms, r.min_ms, r.max_ms)),
        '' if r.temp_bytes is None else f'{r.temp_bytes / 2**20:.1f}',
        '' if r.tokens_per_second is None else f'{r.tokens_per_second:.3g}',
        'unchecked' if r.relative_error is None else f'{r.relative_error:.1e}',
        '' if limit is None else f'{limit / r.median_ms:.0%}',
      )
    )
  widths = [max(map(len, column)) for column in zip(head, *rows)]
  numbers = head.index('median ms')
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if i >= numbers else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in (head, *rows)
  )


def _milliseconds(value: float) -> str:
  return f'{value:.1f}' if value >= 100 else f'{value:.3g}'


@functools.cache
def device_name() -> str:
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return f'cpu ({len(os.sched_getaffinity(0))} cores)'
  return device.device_kind


@functools.cache
def commit() -> str:
  """Returns the commit that the code is at, marked when files differ from it.

  Where the code is no checkout, as in a copy for another machine, SSM_MOE_COMMIT says it.
  """
  here = os.path.dirname(os.path.abspath(__file__))
  command = ['git', '-C', here, 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
  try:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return os.environ.get('SSM_MOE_COMMIT') or 'unknown'
