import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_moe.ops.grouped_matmul import RowOrder, grouped_matmul
from tests import tolerances
from tests.ops.grouped_matmul import orders

_ROWS, _IN, _OUT = 200, 12, 10


def _inputs(group_sizes, trailing=(_OUT,), dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(2), 3)
  num_rows = int(sum(group_sizes))
  rows = jax.random.normal(keys[0], (num_rows, _IN)).astype(dtype)
  weights = jax.random.normal(keys[1], (len(group_sizes), _IN, *trailing)).astype(dtype)
  cotangent = jax.random.normal(keys[2], (num_rows, *trailing)).astype(dtype)
  return rows, weights, jnp.array(group_sizes, jnp.int32), cotangent


def _numpy(rows, weights, group_sizes):
  ends = np.cumsum(group_sizes)
  parts = np.split(np.asarray(rows, np.float64), ends[:-1])
  return np.concatenate(
    [np.tensordot(p, np.asarray(w, np.float64), 1) for p, w in zip(parts, weights)]
  )


def _value_and_gradients(implementation, rows, weights, sizes, cotangent):
  def run(rows, weights):
    return grouped_matmul(rows, weights, sizes, implementation=implementation)

  value, pull = jax.vjp(run, rows, weights)
  return value, *pull(cotangent)


_jitted = jax.jit(_value_and_gradients, static_argnums=0)


_SIZES = {
  'even': (50, 50, 50, 50),
  'uneven': (129, 1, 3, 67),
  'empty': (0, 131, 0, 69, 0),
  'one': (0, 200),
  'single_group': (200,),
  'more_groups_than_rows': (1, 0, 1, 0, 0, 1),
  'over_a_slab': (700, 513, 31, 12),
}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('case', _SIZES)
def test_equals_the_reference(case, dtype):
  inputs = _inputs(_SIZES[case], dtype=dtype)
  expected = _jitted('reference', *[_upcast(x) for x in inputs])
  actual = _jitted('tiled', *inputs)
  assert {leaf.dtype.name for leaf in actual} == {dtype}
  tolerances.assert_close(
    [_upcast(x) for x in actual], list(expected), rtol=tolerances.BY_DTYPE[dtype], what=case
  )


def _upcast(x):
  return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


@pytest.mark.parametrize('implementation', ['reference', 'tiled'])
def test_equals_numpy(implementation):
  for sizes in _SIZES.values():
    rows, weights, group_sizes, _ = _inputs(sizes)
    actual = grouped_matmul(rows, weights, group_sizes, implementation=implementation)
    expected = _numpy(rows, weights, sizes)
    tolerances.assert_close(actual, expected, rtol=tolerances.FLOAT32_REORDERED)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, _ROWS), min_size=4, max_size=4))
def test_any_group_sizes(cuts):
  ends = [*sorted(cuts), _ROWS]
  sizes = np.diff(ends, prepend=0)
  inputs = _inputs(sizes)
  tolerances.assert_close(
    list(_jitted('tiled', *inputs)),
    list(_jitted('reference', *inputs)),
    rtol=tolerances.FLOAT32_REORDERED,
    what=str(sizes),
  )


@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize(('take', 'put'), [(True, False), (False, True), (True, True)])
def test_rows_are_taken_from_tokens_and_put_back(take, put, top_k):
  rows, weights, sizes, cotangent = _inputs(_SIZES['uneven'])
  order = orders.random_order(_ROWS, top_k)
  x = rows[: _ROWS // top_k] if take else rows
  cotangent = cotangent.reshape(-1, top_k, _OUT) if put else cotangent
  actual = orders.value_and_gradients('tiled', order, take, put, x, weights, sizes, cotangent)
  expected = orders.by_indexing(order, take, put, x, weights, sizes, cotangent)
  tolerances.assert_close(list(actual), list(expected), rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.parametrize(
  ('take', 'put', 'message'),
  [
    ((200, 1, 199), None, 'take has 199 rows for 200 assignments, and there are 199 rows'),
    (None, (100, 1, 100), 'put has 100 rows for 100 assignments, and there are 200 rows'),
    ((100, 2, 200), None, 'rows has 200 tokens and take 100; they must be as many'),
  ],
)
def test_an_order_that_does_not_fit_is_refused(take, put, message):
  rows, weights, sizes, _ = _inputs(_SIZES['even'])

  def order(shape):
    if shape is None:
      return None
    tokens, top_k, num_rows = shape
    return RowOrder(jnp.zeros(num_rows, jnp.int32), jnp.zeros((tokens, top_k), jnp.int32))

  with pytest.raises(ValueError, match=f'^grouped_matmul: {message}'):
    grouped_matmul(rows, weights, sizes, take=order(take), put=order(put))


def test_output_axes_stay_apart():
  rows, weights, sizes, cotangent = _inputs((3, 0, 97), trailing=(2, 5))
  flat = weights.reshape(3, _IN, 10)
  value, d_rows, d_weights = _value_and_gradients('tiled', rows, weights, sizes, cotangent)
  chex.assert_shape(value, (100, 2, 5))
  expected = _value_and_gradients('tiled', rows, flat, sizes, cotangent.reshape(100, 10))
  tolerances.assert_close(
    [value.reshape(100, 10), d_rows, d_weights.reshape(3, _IN, 10)],
    list(expected),
    rtol=tolerances.FLOAT32_REORDERED,
  )


@pytest.mark.parametrize('implementation', ['reference', 'tiled'])
def test_relu_is_that_of_the_products(implementation):
  rows, weights, sizes, cotangent = _inputs(_SIZES['uneven'])
  run = functools.partial(grouped_matmul, implementation=implementation)
  products = run(rows, weights, sizes)
  value, pull = jax.vjp(lambda rows, weights: run(rows, weights, sizes, relu=True), rows, weights)
  assert (value == jnp.maximum(products, 0)).all() and (products < 0).any()
  _, pull_products = jax.vjp(lambda rows, weights: run(rows, weights, sizes), rows, weights)
  chex.assert_trees_all_close(pull(cotangent), pull_products(jnp.where(products > 0, cotangent, 0)))


def test_the_work_does_not_grow_with_the_number_of_experts():
  # Of the arrays, only the weights and their gradient may have an axis of experts.
  sizes = (25,) * 8
  inputs = _inputs(sizes)
  text = str(jax.make_jaxpr(_value_and_gradients, static_argnums=0)('tiled', *inputs))
  assert f'f32[8,{_IN},{_OUT}]' in text
  assert f'f32[8,{sum(sizes)}' not in text


@pytest.mark.parametrize('implementation', ['reference', 'tiled'])
@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    (lambda r, w, s: (r[:, 1:], w, s), ValueError, 'rows have 11 columns and weights 12 rows'),
    (lambda r, w, s: (r, w[1:], s), ValueError, '3 matrices for 4 group sizes'),
    (lambda r, w, s: (r.astype('bfloat16'), w, s), ValueError, 'rows are bfloat16 and weights flo'),
    (lambda r, w, s: (r[None], w, s), ValueError, r'rows has shape \(1, 200, 12\); .* \[S, M\]'),
    (lambda r, w, s: (r, w[..., 0], s), ValueError, r'weights has shape \(4, 12\); .* \[E, M, F\]'),
    (lambda r, w, s: (r, w, s[:, None]), ValueError, r'group_sizes has shape \(4, 1\); .* \[E\]'),
    (lambda r, w, s: (r.astype(int), w.astype(int), s), TypeError, 'rows is int32; .* floating'),
    (lambda r, w, s: (r, w, s.astype(float)), TypeError, 'group_sizes is float32; .* integer'),
  ],
)
def test_what_does_not_fit_is_refused(change, error, message, implementation):
  rows, weights, sizes, _ = _inputs(_SIZES['even'])
  with pytest.raises(error, match=f'^grouped_matmul: {message}'):
    # Where types are checked at run time, they would answer before the function does.
    inspect.unwrap(grouped_matmul)(*change(rows, weights, sizes), implementation=implementation)


def test_an_unknown_implementation_is_refused():
  rows, weights, sizes, _ = _inputs(_SIZES['even'])
  with pytest.raises(ValueError, match='there are: auto, megablox, triton_gpu, tiled, reference'):
    inspect.unwrap(grouped_matmul)(rows, weights, sizes, implementation='magic')
