"""A wrong implementation is never timed, and records say what they are of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.analysis import benchmark


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
)


def with_implementation(function):
  return dataclasses.replace(OP, implementations={'power': square, 'other': function})


def test_a_record_for_each_pass_of_each_implementation():
  records = benchmark.run(OP, names=['power', 'product'], repeats=3, seed=0)
  assert [(r.implementation, r.pass_) for r in records] == [
    (name, pass_name) for name in ('power', 'product') for pass_name in benchmark.PASSES
  ]
  for record in records:
    assert 0 < record.min_ms <= record.median_ms <= record.max_ms
    assert record.relative_error <= benchmark.DEFAULT_TOLERANCE['float32']
  assert set(records[0].as_dict()) == {
    *('name', 'shape', 'dtype', 'implementation', 'pass', 'median_ms', 'min_ms', 'max_ms'),
    *('relative_error', 'temp_bytes', 'device', 'jax', 'commit'),
  }
  head, *rows = benchmark.table(records).splitlines()
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
def test_a_wrong_result_is_an_error(function):
  with pytest.raises(benchmark.CheckError, match='square L 8 other: relative error'):
    benchmark.run(with_implementation(function), names=['power', 'other'], repeats=1, seed=0)


def test_a_yardstick_is_not_checked():
  op = dataclasses.replace(
    with_implementation(lambda inputs, constants: 2 * inputs['x']),
    yardsticks={'other': lambda inputs: inputs},
  )
  records = benchmark.run(op, names=['other', 'power'], repeats=1, seed=0)
  assert [r.relative_error is None for r in records] == [True] * 3 + [False] * 3


def test_error_is_relative_to_the_largest_magnitude_of_each_array():
  expected = {'a': np.array([100.0, 1.0]), 'b': np.array([0.01])}
  actual = {'a': np.array([100.0, 2.0]), 'b': np.array([0.0101])}
  assert benchmark.relative_error(actual, expected) == pytest.approx(0.01)
