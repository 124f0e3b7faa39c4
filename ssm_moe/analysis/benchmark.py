"""Checks and times implementations of one op against each other.

Every implementation is checked against an oracle on the data that is then timed, values and
gradients, so that no time is reported for a wrong result. Repeats are interleaved (A B C A B C):
a machine that slows down slows all of them.
"""

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_moe.shapes import Array, Key

PASSES = ('forward', 'backward', 'forward_backward')

# Of `relative_error`. Far above rounding (1e-6 and 4e-3), far below any mistake in a formula.
DEFAULT_TOLERANCE = {'float32': 1e-4, 'bfloat16': 3e-2}

Function = Callable[[Any, Any], Any]


class CheckError(Exception):
  """An implementation's result is not the oracle's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpBenchmark:
  """One op at one shape, and the implementations to compare.

  Attributes:
    name: Name of the op.
    shape: Its sizes, for people.
    dtype: Of the data.
    implementations: By name, functions of `(inputs, constants)`; the result may be any tree of
      floating arrays.
    oracle: A function of the same arguments that gives the right result.
    make_arguments: Makes `(inputs, constants)` from a key: two trees, of which the first is
      differentiated.
    yardsticks: Implementations that compute something else: timed, not checked. By name, what
      makes their inputs of the inputs.
    tolerance: Largest `relative_error` allowed; by dtype if None.
  """

  name: str
  shape: str
  dtype: str
  implementations: Mapping[str, Function]
  oracle: Function
  make_arguments: Callable[[Key[Array, '']], tuple[Any, Any]]
  yardsticks: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
  tolerance: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """One measured pass of one implementation.

  Attributes:
    relative_error: Largest error over what the pass gives (values, gradients, or both), relative to
      the largest magnitude of the same array; None if unchecked.
    temp_bytes: Temporaries of the compiled pass. Those of the backward pass do not include what the
      forward pass keeps for it; those of forward_backward do.
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
  temp_bytes: int
  device: str
  jax: str
  commit: str

  def as_dict(self) -> dict[str, Any]:
    return {key.rstrip('_'): value for key, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class _Pass:
  """A compiled function with its arguments, and the error found when it was checked."""

  compiled: Any
  arguments: tuple[Any, ...]
  relative_error: float | None

  def run(self) -> float:
    """Returns the milliseconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(self.compiled(*self.arguments))
    return 1e3 * (time.perf_counter() - start)


def relative_error(actual: Any, expected: Any) -> float:
  """Returns the largest error over two trees, each array's relative to its largest magnitude."""

  def of_array(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = max(np.abs(expected).max(initial=0.0), np.finfo(np.float32).tiny)
    return np.abs(actual - expected).max(initial=0.0) / scale

  errors = jax.tree.leaves(jax.tree.map(of_array, actual, expected))
  return float(np.max(errors, initial=0.0))  # a NaN stays a NaN


def run(op: OpBenchmark, *, names: Iterable[str], repeats: int, seed: int) -> list[Record]:
  """Checks and times the implementations `names` of an op, all passes.

  Raises:
    CheckError: a result is not the oracle's.
  """
  key_arguments, key_cotangents = jax.random.split(jax.random.key(seed))
  inputs, constants = op.make_arguments(key_arguments)
  passes = {}
  expected = None
  for name in names:
    function = op.implementations[name]
    checked = name not in op.yardsticks
    own_inputs = inputs if checked else op.yardsticks[name](inputs)
    cotangents = _cotangents(jax.eval_shape(function, own_inputs, constants), key_cotangents)
    if expected is None and checked:
      expected = _whole(op.oracle, inputs, constants, cotangents)[0]
    against = expected if checked else None
    for pass_name, timed in _compile(op, name, own_inputs, constants, cotangents, against):
      passes[name, pass_name] = timed

  times = {key: [] for key in passes}
  for _ in range(repeats):
    for key, timed in passes.items():
      times[key].append(timed.run())

  return [
    Record(
      name=op.name,
      shape=op.shape,
      dtype=op.dtype,
      implementation=name,
      pass_=pass_name,
      median_ms=float(np.median(times[name, pass_name])),
      min_ms=min(times[name, pass_name]),
      max_ms=max(times[name, pass_name]),
      relative_error=timed.relative_error,
      temp_bytes=timed.compiled.memory_analysis().temp_size_in_bytes,
      device=_device(),
      jax=jax.__version__,
      commit=_commit(),
    )
    for (name, pass_name), timed in passes.items()
  ]


def table(records: Sequence[Record]) -> str:
  """Returns the records as lines of aligned columns."""
  head = (
    'op',
    'shape',
    'dtype',
    'implementation',
    'pass',
    'median ms',
    'min',
    'max',
    'MiB',
    'error',
  )
  rows = [
    (
      r.name,
      r.shape,
      r.dtype,
      r.implementation,
      r.pass_,
      f'{r.median_ms:.1f}',
      f'{r.min_ms:.1f}',
      f'{r.max_ms:.1f}',
      f'{r.temp_bytes / 2**20:.1f}',
      'unchecked' if r.relative_error is None else f'{r.relative_error:.1e}',
    )
    for r in records
  ]
  widths = [max(map(len, column)) for column in zip(head, *rows)]
  numbers = head.index('median ms')
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if i >= numbers else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in (head, *rows)
  )


def _whole(function: Function, inputs, constants, cotangents):
  """Runs ((outputs, gradients), compiled) of a function."""

  def forward_backward(inputs, constants, cotangents):
    outputs, pullback = jax.vjp(lambda inputs: function(inputs, constants), inputs)
    return outputs, pullback(cotangents)[0]

  compiled = jax.jit(forward_backward).lower(inputs, constants, cotangents).compile()
  return jax.block_until_ready(compiled(inputs, constants, cotangents)), compiled


def _compile(op: OpBenchmark, name: str, inputs, constants, cotangents, expected):
  """Yields the name of each pass and the pass, compiled, run once and checked."""
  function = op.implementations[name]

  def check(actual, expected):
    if expected is None:
      return None
    error = relative_error(actual, expected)
    allowed = DEFAULT_TOLERANCE[op.dtype] if op.tolerance is None else op.tolerance
    if not error <= allowed:
      raise CheckError(f'{op.name} {op.shape} {name}: relative error {error:.3g} > {allowed:.1g}')
    return error

  outputs, gradients = (None, None) if expected is None else expected
  forward = jax.jit(function).lower(inputs, constants).compile()
  error = check(forward(inputs, constants), outputs)
  yield 'forward', _Pass(forward, (inputs, constants), error)

  _, pullback = jax.jit(
    lambda inputs, constants: jax.vjp(lambda inputs: function(inputs, constants), inputs)
  )(inputs, constants)
  backward = jax.jit(lambda pullback, ct: pullback(ct)[0]).lower(pullback, cotangents).compile()
  error = check(backward(pullback, cotangents), gradients)
  yield 'backward', _Pass(backward, (pullback, cotangents), error)

  actual, whole = _whole(function, inputs, constants, cotangents)
  yield 'forward_backward', _Pass(whole, (inputs, constants, cotangents), check(actual, expected))


def _cotangents(outputs, key):
  leaves, structure = jax.tree.flatten(outputs)
  keys = jax.random.split(key, len(leaves))
  return structure.unflatten(
    jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)
    for key, leaf in zip(keys, leaves)
  )


def _device() -> str:
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return f'cpu ({len(os.sched_getaffinity(0))} cores)'
  return device.device_kind


def _commit() -> str:
  """Returns the commit that the code is at, marked when files differ from it."""
  here = os.path.dirname(os.path.abspath(__file__))
  command = ['git', '-C', here, 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
  try:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
