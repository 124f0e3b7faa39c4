"""What holds of the recurrence whatever computes it: continuation, resets, causality."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.ops.ssd import api, cases
from tests.tolerances import FLOAT32_REORDERED, assert_close

OVER_TIME = ('x', 'dt', 'B', 'C', 'segment_ids')

every_implementation = pytest.mark.parametrize('implementation', ['reference', 'chunked'])


def make_arguments(length, **options):
  case = cases.Case(name='property', length=length, **options)
  arguments = cases.make_inputs(case, jax.random.key(6))
  # No head forgets so fast that an old token's gradient rounds to zero.
  arguments['A'] = jnp.maximum(arguments['A'], -2)
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
@pytest.mark.parametrize(
  'middle', [50, *(pytest.param(m, marks=pytest.mark.extended) for m in (1, 128))]
)
def test_second_half_continues_from_the_state_of_the_first(implementation, middle):
  case, arguments = make_arguments(150, D=True, dt_bias=True, dt_softplus=True, h0=True, segments=4)
  # Position 0 of the second half continues from h0, so the cut must not be a document boundary.
  ids = np.array(arguments['segment_ids'])
  ids[:, middle] = ids[:, middle - 1]
  arguments['segment_ids'] = jnp.asarray(ids)
  dy, dh = cases.make_cotangents(case, jax.random.key(7))
  floating, rest = split_static(arguments)
  ssd = functools.partial(api.ssd, implementation=implementation)

  def whole(floating):
    return ssd(**floating, **rest)

  def halves(floating):
    both = {**floating, **rest}
    y_1, h = ssd(**between(both, 0, middle))
    y_2, h = ssd(**{**between(both, middle, case.length), 'h0': h})
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
  _, arguments = make_arguments(150, D=True, dt_bias=True, dt_softplus=True)
  bounds = (0, 1, 33, 128, 150)
  ids = np.repeat(np.arange(4), np.diff(bounds))
  # Ids need not rise: a document may have the id of one that is not its neighbour.
  ids[ids == 2] = 0
  packed = {**arguments, 'segment_ids': jnp.asarray(np.stack([ids, ids]))}
  ssd = jax.jit(
    functools.partial(api.ssd, implementation=implementation), static_argnames=('dt_softplus',)
  )
  y, h = ssd(**packed)
  alone = [ssd(**between(arguments, *bound)) for bound in itertools.pairwise(bounds)]
  expected_y = jnp.concatenate([y for y, _ in alone], axis=1)
  assert_close((y, h), (expected_y, alone[-1][1]), rtol=FLOAT32_REORDERED)


@every_implementation
def test_no_gradient_crosses_a_document_boundary(implementation):
  _, arguments = make_arguments(150, D=True, dt_bias=True, dt_softplus=True, h0=True)
  floating, _ = split_static(arguments)

  @jax.jit
  def gradients_after(boundary, floating):
    after = jnp.arange(150) >= boundary
    ids = jnp.broadcast_to(after[None, :], (2, 150)).astype(jnp.int32)

    def later_loss(floating):
      y, h = api.ssd(**floating, segment_ids=ids, dt_softplus=True, implementation=implementation)
      return jnp.sum(jnp.where(after[None, :, None, None], y**2, 0)) + jnp.sum(h**2)

    return jax.grad(later_loss)(floating)

  # 128 is the first token of a chunk, 41 and 127 are inside one.
  for boundary in (41, 127, 128):
    gradients = gradients_after(boundary, floating)
    assert not np.any(gradients['h0'])
    for name in ('x', 'dt', 'B', 'C'):
      over_features = tuple(range(2, gradients[name].ndim))
      assert not np.any(gradients[name][:, :boundary]), name
      assert np.all(np.any(gradients[name][:, boundary:], axis=over_features)), name


@every_implementation
def test_no_gradient_from_later_tokens(implementation):
  _, arguments = make_arguments(150, D=True, dt_bias=True, dt_softplus=True, h0=True)
  floating, rest = split_static(arguments)

  @jax.jit
  def gradients_of(token):
    def loss(floating):
      y, _ = api.ssd(**floating, **rest, implementation=implementation)
      return jnp.sum(jnp.take(y, token, axis=1))

    return jax.grad(loss)(floating)

  for token in (0, 40, 127, 128, 149):
    gradients = gradients_of(token)
    for name in ('x', 'dt', 'B', 'C'):
      assert not np.any(gradients[name][:, token + 1 :]), name
    assert np.all(np.any(gradients['x'][:, : token + 1], axis=(2, 3)))


def test_segments_that_never_change_are_one_sequence():
  _, arguments = make_arguments(40, h0=True)
  same = jnp.full((2, 40), 5)
  assert_close(api.ssd(**arguments, segment_ids=same), api.ssd(**arguments), rtol=FLOAT32_REORDERED)
