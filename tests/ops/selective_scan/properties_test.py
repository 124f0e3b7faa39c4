"""What holds of the recurrence whatever computes it: continuation, resets, causality."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.ops.selective_scan import api, cases
from tests.tolerances import FLOAT32_REORDERED, assert_close

IMPLEMENTATIONS = ('reference', 'associative', 'chunked')
OVER_TIME = ('x', 'dt', 'B', 'C', 'z', 'segment_ids')

every_implementation = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)


def make_arguments(length, **options):
  case = cases.Case(name='property', length=length, d_inner=3, **options)
  arguments = cases.make_inputs(case, jax.random.key(6))
  return case, {name: v for name, v in arguments.items() if v is not None}


def between(arguments, start, stop):
  """Returns the arguments of the tokens [start, stop)."""
  return {name: v[:, start:stop] if name in OVER_TIME else v for name, v in arguments.items()}


def split_static(arguments):
  """Returns the floating arguments, which are differentiated, and the others."""
  floating = {
    name: v
    for name, v in arguments.items()
    if name != 'dt_softplus' and jnp.issubdtype(v.dtype, jnp.floating)
  }
  return floating, {name: v for name, v in arguments.items() if name not in floating}


@every_implementation
@pytest.mark.parametrize('middle', [pytest.param(1, marks=pytest.mark.extended), 50])
def test_second_half_continues_from_the_state_of_the_first(implementation, middle):
  case, arguments = make_arguments(
    90, D=True, z=True, dt_bias=True, dt_softplus=True, h0=True, segments=4
  )
  # Position 0 of the second half continues from h0, so the cut must not be a document boundary.
  ids = np.array(arguments['segment_ids'])
  ids[:, middle] = ids[:, middle - 1]
  arguments['segment_ids'] = jnp.asarray(ids)
  dy, dh = cases.make_cotangents(case, jax.random.key(7))
  floating, rest = split_static(arguments)
  scan = functools.partial(api.selective_scan, implementation=implementation)

  def whole(floating):
    return scan(**floating, **rest)

  def halves(floating):
    both = {**floating, **rest}
    y_1, h = scan(**between(both, 0, middle))
    y_2, h = scan(**{**between(both, middle, case.length), 'h0': h})
    return jnp.concatenate([y_1, y_2], axis=1), h

  def run(function):
    @jax.jit
    def values_and_gradients(floating):
      outputs, pullback = jax.vjp(function, floating)
      return outputs, pullback((dy, dh))[0]

    return values_and_gradients(floating)

  assert_close(run(halves), run(whole), rtol=FLOAT32_REORDERED)


@every_implementation
def test_packed_documents_equal_each_document_alone(implementation):
  _, arguments = make_arguments(75, D=True, z=True, dt_bias=True, dt_softplus=True)
  bounds = (0, 1, 33, 64, 75)
  ids = np.repeat(np.arange(4), np.diff(bounds))
  # Ids need not rise: a document may have the id of one that is not its neighbour.
  ids[ids == 2] = 0
  packed = {**arguments, 'segment_ids': jnp.asarray(np.stack([ids, ids]))}
  static = ('dt_softplus',)
  scan = jax.jit(
    functools.partial(api.selective_scan, implementation=implementation), static_argnames=static
  )
  y, h = scan(**packed)
  alone = [scan(**between(arguments, *bound)) for bound in itertools.pairwise(bounds)]
  expected_y = jnp.concatenate([y for y, _ in alone], axis=1)
  assert_close((y, h), (expected_y, alone[-1][1]), rtol=FLOAT32_REORDERED)


@every_implementation
def test_no_gradient_crosses_a_document_boundary(implementation):
  _, arguments = make_arguments(70, D=True, z=True, dt_bias=True, dt_softplus=True, h0=True)
  # 32 and 64 are the first tokens of chunks, 41 is inside one.
  for boundary in (32, 41, 64):
    ids = jnp.broadcast_to(jnp.arange(70)[None, :] >= boundary, (2, 70)).astype(jnp.int32)
    floating, rest = split_static({**arguments, 'segment_ids': ids})

    def later_loss(floating, rest=rest, boundary=boundary):
      y, h = api.selective_scan(**floating, **rest, implementation=implementation)
      return jnp.sum(y[:, boundary:] ** 2) + jnp.sum(h**2)

    gradients = jax.jit(jax.grad(later_loss))(floating)
    assert not np.any(gradients['h0'])
    for name in ('x', 'dt', 'B', 'C', 'z'):
      assert not np.any(gradients[name][:, :boundary]), name
      assert np.all(np.any(gradients[name][:, boundary:], axis=2)), name


@every_implementation
def test_no_gradient_from_later_tokens(implementation):
  _, arguments = make_arguments(70, D=True, z=True, dt_bias=True, dt_softplus=True, h0=True)
  floating, rest = split_static(arguments)

  @jax.jit
  def gradients_of(token):
    def loss(floating):
      y, _ = api.selective_scan(**floating, **rest, implementation=implementation)
      return jnp.sum(jnp.take(y, token, axis=1))

    return jax.grad(loss)(floating)

  for token in (0, 31, 32, 40, 69):
    gradients = gradients_of(token)
    for name in ('x', 'dt', 'B', 'C', 'z'):
      assert not np.any(gradients[name][:, token + 1 :]), name
    assert np.all(np.any(gradients['x'][:, : token + 1], axis=2))


def test_segments_that_never_change_are_one_sequence():
  _, arguments = make_arguments(40, h0=True)
  same = jnp.full((2, 40), 5)
  assert_close(
    api.selective_scan(**arguments, segment_ids=same),
    api.selective_scan(**arguments),
    rtol=FLOAT32_REORDERED,
  )
