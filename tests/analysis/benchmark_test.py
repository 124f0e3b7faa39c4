"""A wrong implementation is never timed, and records say what they are of."""

import dataclasses
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.analysis import benchmark, benchmark_records
from ssm_moe.analysis.benchmark_limits import Ceilings, Work
from ssm_moe.analysis.benchmark_timing import Timing


def square(inputs, constants):
  return constants * inputs['x'] ** 2


@jax.custom_vjp
def wrong_gradient(x):
  return x**2


wrong_gradient.defvjp(lambda x: (x**2, x), lambda x, dy: (1.01 * 2 * x * dy,))

OP = benchmark.OpBenchmark(
  name='square',
  shape='L 8',
  dtype='float32',
  implementations={'power': square, 'product': lambda i, c: c * i['x'] * i['x']},
  oracle=square,
  make_arguments=lambda key: ({'x': jax.random.normal(key, (8,))}, jnp.float32(3)),
  tokens=8,
)


def with_implementation(function):
  return dataclasses.replace(OP, implementations={'power': square, 'other': function})


def run(op, names, repeats=1, **options):
  return benchmark.run(op, names=names, seed=0, timing=Timing(repeats=repeats), **options)


def test_a_record_for_each_pass_of_each_implementation():
  outcome = run(OP, ['power', 'product'], repeats=3)
  records = outcome.records
  assert (outcome.skipped, outcome.failed) == ([], [])
  assert [(r.implementation, r.pass_) for r in records] == [
    (name, pass_name) for name in ('power', 'product') for pass_name in benchmark.PASSES
  ]
  for record in records:
    assert 0 < record.min_ms <= record.median_ms <= record.max_ms
    assert record.relative_error <= benchmark.DEFAULT_TOLERANCE['float32']
    assert record.tokens_per_second == pytest.approx(8e3 / record.median_ms)
    assert record.peak_bytes >= record.temp_bytes
  assert set(records[0].as_dict()) == {
    *('name', 'shape', 'dtype', 'implementation', 'pass', 'median_ms', 'min_ms', 'max_ms'),
    *('relative_error', 'tokens_per_second', 'peak_bytes', 'temp_bytes', 'device', 'jax', 'commit'),
  }
  head, *rows = benchmark_records.table(records).splitlines()
  assert len(rows) == 6
  assert head.index('pass') == rows[0].index('forward')


@pytest.mark.parametrize(
  'function',
  [
    lambda inputs, constants: 1.01 * square(inputs, constants),
    lambda inputs, constants: constants * wrong_gradient(inputs['x']),
    lambda inputs, constants: square(inputs, constants) * jnp.nan,
  ],
  ids=['value', 'gradient', 'nan'],
)
def test_a_wrong_result_gets_no_time_and_does_not_cost_the_others_theirs(function):
  outcome = run(with_implementation(function), ['power', 'other'])
  assert [r.implementation for r in outcome.records] == ['power'] * 3
  ((name, reason),) = outcome.failed
  assert name == 'other' and 'square L 8 other: relative error' in reason


def test_what_cannot_run_is_left_out_and_what_breaks_has_failed():
  def unsupported(inputs, constants):
    raise NotImplementedError('it is for GPUs')

  def broken(inputs, constants):
    raise RuntimeError('no such register')

  op = dataclasses.replace(
    OP,
    implementations={'power': square, 'unsupported': unsupported, 'broken': broken},
    left_out={'slow': 'it would take minutes'},
  )
  outcome = run(op, op.names)
  assert {r.implementation for r in outcome.records} == {'power'}
  assert set(outcome.skipped) == {
    ('slow', 'it would take minutes'),
    ('unsupported', 'it is for GPUs'),
  }
  assert outcome.failed == [('broken', 'RuntimeError: no such register')]


def test_a_yardstick_is_not_checked():
  op = dataclasses.replace(
    with_implementation(lambda inputs, constants: 2 * inputs['x']),
    yardsticks={'other': lambda inputs: inputs},
  )
  records = run(op, ['other', 'power']).records
  errors = {r.implementation: r.relative_error for r in records}
  assert errors['other'] is None and errors['power'] is not None


def test_the_oracle_computes_in_float32_from_the_same_numbers():
  # 300 squares of 1 add up to 300, which bfloat16 has not: it would round to 300 +- 1.
  def total(inputs, _):
    assert inputs['x'].dtype == jnp.float32
    return jnp.sum(inputs['x'] ** 2, keepdims=True)

  op = dataclasses.replace(
    OP,
    dtype='bfloat16',
    implementations={
      'sum': lambda inputs, _: jnp.sum(inputs['x'].astype(jnp.float32) ** 2, keepdims=True)
    },
    oracle=total,
    make_arguments=lambda key: ({'x': jnp.ones(301, jnp.bfloat16)}, None),
  )
  (forward, *_) = run(op, ['sum']).records
  assert forward.relative_error < 1e-6


def test_gradients_may_have_an_oracle_of_their_own():
  op = dataclasses.replace(OP, gradient_oracle=lambda i, c: 2 * square(i, c))
  ((_, reason),) = run(op, ['power']).failed
  assert 'relative error 0.5' in reason  # the values alone are right


def test_arguments_take_turns_when_they_are_small():
  # The data has three sets, so that a cache of 80 bytes holds none from the call before.
  seen = []

  def make_arguments(key):
    seen.append(key)
    return OP.make_arguments(key)

  op = dataclasses.replace(OP, make_arguments=make_arguments)
  timing = Timing(repeats=1, least_bytes=80, interleaved=False, least_ms=0.01)
  outcome = benchmark.run(op, names=['power'], seed=0, timing=timing)
  assert len(outcome.records) == 3 and len(seen) == 3


def test_the_limit_is_a_record_beside_the_others():
  op = dataclasses.replace(OP, work={'forward': Work(num_bytes=1000)})
  ceilings = Ceilings(bytes_per_second=1e6, flops_per_second=1e6)
  *_, limit = run(op, ['power'], ceilings=ceilings).records
  assert (limit.implementation, limit.pass_, limit.median_ms) == ('limit', 'forward', 1.0)
  row = benchmark_records.table(
    [dataclasses.replace(limit, implementation='a', median_ms=4), limit]
  )
  assert row.splitlines()[1].endswith(' 25%')


def test_every_implementation_of_a_room_is_there():
  room = types.SimpleNamespace(Implementation=typing.Literal['auto', 'one', 'two', 'three'])
  found = benchmark.by_implementation(room, lambda x, implementation: (x, implementation), {'two'})
  assert {name: function(1) for name, function in found.items()} == {
    'one': (1, 'one'),
    'three': (1, 'three'),
  }


def test_error_is_relative_to_the_largest_magnitude_of_each_array():
  expected = {'a': np.float32([128.0, 1.0]), 'b': np.float32([0.0625])}
  actual = {'a': np.float32([128.0, 2.0]), 'b': np.float32([0.0634765625])}
  assert benchmark.relative_error(actual, expected) == 1 / 64
