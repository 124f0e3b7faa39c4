"""Checks and times implementations of one op against each other.

Every implementation is checked against an oracle on the data that is then timed, values and
gradients, so that no time is reported for a wrong result. The oracle computes in float32, from the
same numbers.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_moe.analysis.benchmark_limits import Ceilings, Work
from ssm_moe.analysis.benchmark_peers import Peer
from ssm_moe.analysis.benchmark_records import Record, make_record
from ssm_moe.analysis.benchmark_timing import Timing, measure, milliseconds
from ssm_moe.ops import implementation
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
    oracle: A function of the same arguments that gives the right result, from inputs in float32.
    oracle_name: What it is, for people.
    gradient_oracle: Likewise for the gradients, where `oracle` would take too much for them.
    make_arguments: Makes `(inputs, constants)` from a key: two trees, of which the first is
      differentiated.
    yardsticks: Implementations that compute something else: timed, not checked. By name, what
      makes their inputs of the inputs.
    left_out: By name, why an implementation is not run at this shape.
    peers: Other libraries' implementations.
    tokens: Of one call; None if it has none.
    work: By pass, the least that it takes; empty if unknown.
    tolerance: Largest `relative_error` allowed; by dtype if None.
  """

  name: str
  shape: str
  dtype: str
  implementations: Mapping[str, Function]
  oracle: Function
  make_arguments: Callable[[Key[Array, '']], tuple[Any, Any]]
  oracle_name: str = 'the float32 reference'
  gradient_oracle: Function | None = None
  yardsticks: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
  left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
  peers: tuple[Peer, ...] = ()
  tokens: int | None = None
  work: Mapping[str, Work] = dataclasses.field(default_factory=dict)
  tolerance: float | None = None

  @property
  def names(self) -> list[str]:
    """Of all implementations and peers, those that are left out too."""
    return [*self.implementations, *self.left_out, *(peer.name for peer in self.peers)]

  def described(self) -> dict[str, Any]:
    """Returns the fields that all its records share."""
    return {'name': self.name, 'shape': self.shape, 'dtype': self.dtype, 'tokens': self.tokens}


def by_implementation(
  room: types.ModuleType, function: Callable[..., Any], left_out: Mapping[str, str]
) -> dict[str, Function]:
  """Returns `function` once for each implementation of a room of ops, which is its keyword."""
  names = [name for name in typing.get_args(room.Implementation) if name != 'auto']
  return {
    name: functools.partial(function, implementation=name) for name in names if name not in left_out
  }


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of an op's implementations.

  Attributes:
    records: Of those that are right.
    skipped: Implementation, and why it was not run.
    failed: Implementation, and what is wrong with it.
  """

  records: list[Record] = dataclasses.field(default_factory=list)
  skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Pass:
  """A compiled function with the arguments that it takes in turn, and its error when checked."""

  compiled: Any
  argument_sets: tuple[tuple[Any, ...], ...]
  relative_error: float | None

  def run(self, calls: int) -> float:
    """Returns the milliseconds of a call, of so many without waiting between them."""
    return milliseconds(self.compiled, self.argument_sets, calls)

  def num_bytes(self) -> dict[str, int]:
    analysis = self.compiled.memory_analysis()
    whole = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    whole += analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
    return {'peak_bytes': whole, 'temp_bytes': analysis.temp_size_in_bytes}


def relative_error(actual: Any, expected: Any) -> float:
  """Returns the largest error over two trees, each array's relative to its largest magnitude.

  On the device, in float32: tens of millions of elements would take the host seconds.
  """

  errors = jax.tree.map(
    lambda a, e: float(_array_error(jnp.asarray(a), jnp.asarray(e))), actual, expected
  )
  return float(np.max(jax.tree.leaves(errors), initial=0.0))  # a NaN stays a NaN


@jax.jit
def _array_error(actual: Array, expected: Array) -> Array:
  actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(expected), initial=0), jnp.finfo(jnp.float32).tiny)
  return jnp.max(jnp.abs(actual - expected), initial=0) / scale


def run(
  op: OpBenchmark,
  *,
  names: Iterable[str],
  seed: int,
  timing: Timing,
  ceilings: Ceilings | None = None,
) -> Outcome:
  """Checks and times the implementations `names` of an op, all passes.

  An implementation that is wrong, or fails in whatever way, does not cost the others' times.

  Args:
    op: What to run.
    names: Of implementations and peers.
    seed: Of the data.
    timing: How to time.
    ceilings: Of this machine, for the records of the limit; None leaves them out.
  """
  outcome = Outcome()
  data = _Data(op, seed, timing)
  names = [name for name in op.names if name in set(names)]
  outcome.skipped.extend((name, op.left_out[name]) for name in names if name in op.left_out)
  own = [name for name in names if name in op.implementations]
  # Interleaved (A B C A B C), so that a machine that slows down slows all of them; or one after
  # the other, where all that they keep would not fit at once.
  for group in [own] if timing.interleaved else [[name] for name in own]:
    outcome.records.extend(_time(op, group, data, timing, outcome))
  for peer in op.peers:
    if peer.name not in names:
      continue
    try:
      arguments, cotangents = data.sets[0], data.cotangents(op.oracle)
      records = [
        make_record(
          times,
          **op.described(),
          implementation=peer.title,
          pass_=pass_name,
          relative_error=_check(op, peer.name, actual, data.expected(cotangents)[what]),
        )
        for pass_name, times, actual, what in peer.run(*arguments, cotangents, timing)
      ]
    except Exception as error:
      _note(outcome, peer.name, error)
    else:
      outcome.records.extend(records)
  if ceilings is not None and outcome.records:
    outcome.records.extend(
      make_record(
        [1e3 * work.seconds(ceilings)], **op.described(), implementation='limit', pass_=pass_name
      )
      for pass_name, work in op.work.items()
    )
  return outcome


def _time(
  op: OpBenchmark, names: list[str], data: '_Data', timing: Timing, outcome: Outcome
) -> list[Record]:
  """Returns the records of implementations, and notes in `outcome` why there are none of one."""
  passes: dict[tuple[str, str], _Pass] = {}
  times: dict[tuple[str, str], list[float]] = {}
  for name in names:
    found = {}
    try:
      for pass_name, one in _compile(op, name, data):
        if not timing.interleaved:
          times |= measure({(name, pass_name): one}, timing)
          one = dataclasses.replace(one, argument_sets=())
        found[name, pass_name] = one
    except Exception as error:
      _note(outcome, name, error)
    else:
      passes |= found
  if timing.interleaved:
    times = measure(passes, timing)
  return [
    make_record(
      times[name, pass_name],
      **op.described(),
      implementation=name,
      pass_=pass_name,
      relative_error=one.relative_error,
      **one.num_bytes(),
    )
    for (name, pass_name), one in passes.items()
  ]


def _note(outcome: Outcome, name: str, error: Exception) -> None:
  message = (str(error).splitlines() or [type(error).__name__])[0]
  if isinstance(error, NotImplementedError | ModuleNotFoundError):
    outcome.skipped.append((name, message))
  elif 'RESOURCE_EXHAUSTED' in message or 'out of memory' in message:
    outcome.skipped.append((name, 'it runs out of memory'))
  elif isinstance(error, CheckError):
    outcome.failed.append((name, message))
  else:
    outcome.failed.append((name, f'{type(error).__name__}: {message}'))


class _Data:
  """The arguments of an op, as many sets as take turns, and what is right for the first."""

  def __init__(self, op: OpBenchmark, seed: int, timing: Timing):
    self._op = op
    key, self._key_cotangents = jax.random.split(jax.random.key(seed))
    one = op.make_arguments(key)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(one))
    number = min(max(math.ceil(timing.least_bytes / size), 1), timing.most_sets)
    others = jax.random.split(jax.random.fold_in(key, 1), number - 1)
    self.sets = (one, *(op.make_arguments(other) for other in others))
    self._expected = None

  def cotangents(self, function: Function, inputs: Any = None) -> Any:
    """Returns random cotangents of what `function` returns, the same numbers for each."""
    own, constants = self.sets[0]
    outputs = jax.eval_shape(function, own if inputs is None else inputs, constants)
    leaves, structure = jax.tree.flatten(outputs)
    keys = jax.random.split(self._key_cotangents, len(leaves))
    return structure.unflatten(
      jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)
      for key, leaf in zip(keys, leaves)
    )

  def expected(self, cotangents: Any) -> tuple[Any, Any]:
    """Returns the right outputs and gradients, in float32."""
    if self._expected is None:
      inputs, constants = _widened(self.sets[0])
      arguments = (inputs, constants, _widened(cotangents))
      # Else a GPU multiplies float32 in TF32, with 10 bits.
      with jax.default_matmul_precision('highest'):
        if self._op.gradient_oracle is None:
          compiled = _lower(_forward_backward(self._op.oracle), *arguments).compile()
          self._expected = jax.block_until_ready(compiled(*arguments))
        else:
          outputs = jax.jit(self._op.oracle)(inputs, constants)
          whole = _lower(_forward_backward(self._op.gradient_oracle), *arguments).compile()
          self._expected = jax.block_until_ready((outputs, whole(*arguments)[1]))
    return self._expected


def _widened(tree: Any) -> Any:
  def widen(leaf):
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf

  return jax.tree.map(widen, tree)


def _lower(function: Function, *arguments: Any) -> jax.stages.Lowered:
  with implementation.on_devices(1):
    return jax.jit(function).lower(*arguments)


def _forward_backward(function: Function) -> Callable[..., tuple[Any, Any]]:
  def whole(inputs, constants, cotangents):
    outputs, pullback = jax.vjp(lambda inputs: function(inputs, constants), inputs)
    return outputs, pullback(cotangents)[0]

  return whole


def _check(op: OpBenchmark, name: str, actual: Any, expected: Any) -> float:
  error = relative_error(actual, expected)
  allowed = DEFAULT_TOLERANCE[op.dtype] if op.tolerance is None else op.tolerance
  if not error <= allowed:
    raise CheckError(f'{op.name} {op.shape} {name}: relative error {error:.3g} > {allowed:.1g}')
  return error


def _compile(op: OpBenchmark, name: str, data: _Data) -> Iterator[tuple[str, _Pass]]:
  """Yields the name of each pass and the pass, compiled, run once and checked."""
  function = op.implementations[name]
  yardstick = op.yardsticks.get(name)
  sets = data.sets
  if yardstick is not None:
    sets = tuple((yardstick(inputs), constants) for inputs, constants in sets)
  cotangents = data.cotangents(function, sets[0][0])
  expected = None if yardstick is not None else data.expected(cotangents)

  def checked(actual, part):
    return None if expected is None else _check(op, name, actual, part(expected))

  forward = _lower(function, *sets[0]).compile()
  error = checked(forward(*sets[0]), lambda both: both[0])
  yield 'forward', _Pass(forward, sets, error)

  with implementation.on_devices(1):
    pull = jax.jit(
      lambda inputs, constants: jax.vjp(lambda inputs: function(inputs, constants), inputs)[1]
    )
    backward_sets = tuple((pull(*arguments), cotangents) for arguments in sets)
  backward = _lower(lambda pullback, ct: pullback(ct)[0], *backward_sets[0]).compile()
  error = checked(backward(*backward_sets[0]), lambda both: both[1])
  yield 'backward', _Pass(backward, backward_sets, error)
  # What the forward pass has kept for it can be most of the memory.
  del backward, backward_sets

  whole_sets = tuple((*arguments, cotangents) for arguments in sets)
  whole = _lower(_forward_backward(function), *whole_sets[0]).compile()
  error = checked(whole(*whole_sets[0]), lambda both: both)
  yield 'forward_backward', _Pass(whole, whole_sets, error)
