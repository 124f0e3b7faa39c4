import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.ops.causal_conv1d import causal_conv1d, shifted
from tests import tolerances
from tests.ops.causal_conv1d import cases

_BATCH, _LENGTH, _CHANNELS, _WIDTH = 2, 13, 6, 4


@pytest.fixture
def inputs(rng):
  keys = jax.random.split(rng, 4)
  x = jax.random.normal(keys[0], (_BATCH, _LENGTH, _CHANNELS))
  kernel = jax.random.normal(keys[1], (_WIDTH, _CHANNELS))
  bias = jax.random.normal(keys[2], (_CHANNELS,))
  state = jax.random.normal(keys[3], (_BATCH, _WIDTH - 1, _CHANNELS))
  return x, kernel, bias, state


@chex.variants(with_jit=True, without_jit=True)
class AgainstLoop(chex.TestCase):
  def test_equals_a_loop(self):
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (_BATCH, _LENGTH, _CHANNELS))
    kernel = jax.random.normal(keys[1], (_WIDTH, _CHANNELS))
    bias = jax.random.normal(keys[2], (_CHANNELS,))
    state = jax.random.normal(keys[3], (_BATCH, _WIDTH - 1, _CHANNELS))
    y, last = self.variant(lambda *a: causal_conv1d(*a[:3], state=a[3]))(x, kernel, bias, state)
    before = np.concatenate([state, x], axis=1)
    expected = np.zeros(x.shape, np.float32)
    for t in range(_LENGTH):
      for w in range(_WIDTH):
        expected[:, t] += np.asarray(kernel)[w] * before[:, t + w]
    tolerances.assert_close(y, expected + bias, rtol=tolerances.FLOAT32_REORDERED)
    chex.assert_trees_all_equal(last, before[:, -(_WIDTH - 1) :])


def test_agrees_with_the_library_convolution(inputs):
  x, kernel, bias, _ = inputs
  y, _ = causal_conv1d(x, kernel, bias)
  expected = jax.lax.conv_general_dilated(
    x,
    kernel[:, None, :],
    (1,),
    [(_WIDTH - 1, 0)],
    dimension_numbers=('NWC', 'WIO', 'NWC'),
    feature_group_count=_CHANNELS,
  )
  expected = expected + bias[None, None, :]
  tolerances.assert_close(y, expected, rtol=tolerances.FLOAT32_REORDERED)


def test_the_activation_is_of_the_sum_and_not_of_the_state(inputs):
  x, kernel, bias, state = inputs
  linear, last = causal_conv1d(x, kernel, bias, state=state)
  y, last_activated = causal_conv1d(x, kernel, bias, activation='silu', state=state)
  tolerances.assert_close(y, jax.nn.silu(linear), rtol=tolerances.FLOAT32_REORDERED)
  chex.assert_trees_all_equal(last_activated, last)


@pytest.mark.parametrize('case', cases.CASES, ids=lambda case: case.name)
def test_the_state_found_alone_is_the_same(case):
  @jax.jit
  def both(key):
    arguments, _ = cases.make_arguments(case, key)
    rest = {name: arguments[name] for name in ('segment_ids', 'state')}
    alone = shifted.last_state(arguments['x'], case.width, **rest)
    return alone, causal_conv1d(**arguments)[1]

  chex.assert_trees_all_equal(*both(jax.random.key(1)))


@pytest.mark.parametrize('cut', [1, 2, 3, 7, 12])
def test_any_split_equals_the_whole(inputs, cut):
  x, kernel, bias, state = inputs
  whole, last = causal_conv1d(x, kernel, bias, state=state)
  first, middle = causal_conv1d(x[:, :cut], kernel, bias, state=state)
  second, end = causal_conv1d(x[:, cut:], kernel, bias, state=middle)
  chex.assert_trees_all_equal(whole, jnp.concatenate([first, second], axis=1))
  chex.assert_trees_all_equal(last, end)


@pytest.mark.parametrize('cut', [1, 2, 5, 11])
def test_packed_documents_equal_each_alone(inputs, cut):
  x, kernel, bias, state = inputs
  segment_ids = jnp.broadcast_to(jnp.where(jnp.arange(_LENGTH) < cut, 3, 5), (_BATCH, _LENGTH))
  packed, last = causal_conv1d(x, kernel, bias, segment_ids=segment_ids, state=state)
  first, _ = causal_conv1d(x[:, :cut], kernel, bias, state=state)
  second, end = causal_conv1d(x[:, cut:], kernel, bias)
  chex.assert_trees_all_equal(packed, jnp.concatenate([first, second], axis=1))
  # What the next window starts from holds nothing of the first document either.
  chex.assert_trees_all_equal(last, end)


def test_no_gradient_from_later_tokens_or_other_documents(inputs):
  x, kernel, bias, _ = inputs
  segment_ids = jnp.broadcast_to((jnp.arange(_LENGTH) >= 5).astype(jnp.int32), (_BATCH, _LENGTH))

  def one_output(x, t):
    return causal_conv1d(x, kernel, bias, segment_ids=segment_ids)[0][:, t].sum()

  for t in (4, 6, 10):
    reached = np.abs(jax.grad(one_output)(x, t)).sum(axis=(0, 2)) > 0
    start = max(t - _WIDTH + 1, 5 if t >= 5 else 0)
    np.testing.assert_array_equal(np.flatnonzero(reached), np.arange(start, t + 1))


@pytest.mark.parametrize(
  'ids',
  [
    # An id may come back; documents shorter than the filter; ids in no order.
    [0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 2, 2, 0],
    [7, 7, 3, 3, 3, 3, 3, 7, 7, 7, 3, 7, 7],
    [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 4],
    [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2],
  ],
)
@pytest.mark.parametrize('width', [1, 2, 4, 6])
def test_a_document_ends_where_the_id_changes(inputs, ids, width):
  x, kernel, bias, state = inputs
  kernel, state = jnp.tile(kernel, (2, 1))[:width], jnp.tile(state, (1, 2, 1))[:, : width - 1]
  segment_ids = jnp.broadcast_to(jnp.array(ids), (_BATCH, _LENGTH))
  packed, last = causal_conv1d(x, kernel, bias, segment_ids=segment_ids, state=state)
  cuts = [0, *(np.flatnonzero(np.diff(ids)) + 1), _LENGTH]
  alone = []
  for start, stop in itertools.pairwise(cuts):
    y, end = causal_conv1d(x[:, start:stop], kernel, bias, state=None if start else state)
    alone.append(y)
  chex.assert_trees_all_equal(packed, jnp.concatenate(alone, axis=1))
  chex.assert_trees_all_equal(last, end)


def test_the_document_of_the_state_may_end_before_the_state_is_used_up(inputs):
  # Fewer tokens than the state holds: what is kept of the former state is of the same document.
  x, kernel, bias, state = inputs
  ones = jnp.ones((_BATCH, 2), jnp.int32)
  _, last = causal_conv1d(x[:, :2], kernel, bias, segment_ids=ones, state=state)
  chex.assert_trees_all_equal(last, jnp.concatenate([state[:, 2:], x[:, :2]], axis=1))
  changed = ones.at[:, 1].set(2)
  _, last = causal_conv1d(x[:, :2], kernel, bias, segment_ids=changed, state=state)
  chex.assert_trees_all_equal(last, jnp.zeros_like(state).at[:, 2].set(x[:, 1]))


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    (dict(x=jnp.ones((5, 6))), ValueError, r'x has shape \(5, 6\); it must be \[B, L, D\]'),
    (dict(x=jnp.ones((2, 0, 6))), ValueError, 'x has length 0'),
    (dict(kernel=jnp.ones(6)), ValueError, r'kernel has shape \(6,\); it must be \[W, D\]'),
    (dict(kernel=jnp.ones((0, 6))), ValueError, 'kernel has width 0'),
    (dict(kernel=jnp.ones((4, 1))), ValueError, r'kernel has shape \(4, 1\); .* = \(4, 6\)'),
    (dict(kernel=jnp.ones((3, 6))), ValueError, r'state has shape \(2, 3, 6\); .* = \(2, 2, 6\)'),
    (dict(bias=jnp.ones(1)), ValueError, r'bias has shape \(1,\); it must be \[D\] = \(6,\)'),
    (dict(state=jnp.ones((2, 4, 6))), ValueError, r'state has shape \(2, 4, 6\)'),
    (dict(segment_ids=jnp.ones((1, 13), int)), ValueError, r'segment_ids has shape \(1, 13\)'),
    (dict(segment_ids=jnp.ones((2, 13))), TypeError, 'segment_ids is float32; it must be integer'),
    (dict(x=jnp.ones((2, 13, 6), int)), TypeError, 'x is int32; it must be floating point'),
    (dict(bias=jnp.ones(6, int)), TypeError, 'bias is int32; it must be floating point'),
    (dict(activation='relu'), ValueError, "activation is 'relu'; it must be 'silu' or None"),
  ],
)
def test_what_does_not_fit_is_refused(inputs, change, error, message):
  arrays = dict(zip(('x', 'kernel', 'bias', 'state'), inputs)) | change
  with pytest.raises(error, match=f'causal_conv1d: {message}'):
    # Where types are checked at run time, they would answer before the function does.
    inspect.unwrap(causal_conv1d)(**arrays)
