"""The chunked form equals the reference on every case: values, and gradients of all inputs."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from ssm_moe.ops.ssd import api, cases, chunked
from tests.ops.gradients import value_and_gradients
from tests.tolerances import BY_DTYPE, assert_close


@functools.cache
def expected_results(case):
  arguments = cases.make_inputs(case, jax.random.key(1))
  cotangents = cases.make_cotangents(case, jax.random.key(2))
  reference = functools.partial(api.ssd, implementation='reference')
  return arguments, cotangents, value_and_gradients(reference, arguments, cotangents)


_SLOW = ('all_128', 'bias_129', 'segments_129', 'group_a_head_129')
_EXTENDED = ('all_300',)


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(
      case,
      id=case.name,
      marks=[pytest.mark.slow] * (case.name in _SLOW)
      + [pytest.mark.extended] * (case.name in _EXTENDED),
    )
    for case in cases.CASES
  ],
)
def test_equals_reference_in_values_and_gradients(case):
  arguments, cotangents, expected = expected_results(case)
  function = functools.partial(api.ssd, implementation='chunked')
  actual = value_and_gradients(function, arguments, cotangents)
  (y, h), gradients = actual
  chex.assert_type(y, arguments['x'].dtype)
  chex.assert_type(h, jnp.float32)
  for name, gradient in gradients.items():
    chex.assert_type(gradient, arguments[name].dtype)
  assert_close(actual, expected, rtol=BY_DTYPE[case.dtype], what=case.name)


@pytest.mark.parametrize(
  'chunk_size', [5, 64, *(pytest.param(q, marks=pytest.mark.extended) for q in (1, 256))]
)
def test_result_does_not_depend_on_chunk_size(chunk_size):
  case = next(case for case in cases.CASES if case.name == 'all_129')
  arguments, cotangents, expected = expected_results(case)
  function = functools.partial(chunked.ssd, chunk_size=chunk_size)
  actual = value_and_gradients(function, arguments, cotangents)
  assert_close(actual, expected, rtol=BY_DTYPE[case.dtype])


def test_heads_of_a_group_share_B_and_C():
  case = cases.Case(name='groups', length=9, num_heads=6, num_groups=2)
  arguments = cases.make_inputs(case, jax.random.key(3))
  arrays = {name: v for name, v in arguments.items() if isinstance(v, jax.Array)}
  # One group a head, with the group's B and C written out for each of its three heads.
  one_each = {name: jnp.repeat(arguments[name], 3, axis=2) for name in ('B', 'C')}
  for implementation in ('reference', 'chunked'):
    ssd = jax.jit(functools.partial(api.ssd, implementation=implementation))
    expected = ssd(**{**arrays, **one_each})
    assert_close(ssd(**arrays), expected, rtol=BY_DTYPE[case.dtype], what=implementation)


class WithAndWithoutJit(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_equals_reference(self):
    case = cases.Case(
      name='jit', length=7, D=True, dt_bias=True, dt_softplus=True, h0=True, segments=2
    )
    arguments, cotangents, (expected, expected_gradients) = expected_results(case)
    softplus = arguments['dt_softplus']
    arrays = {name: v for name, v in arguments.items() if name != 'dt_softplus'}
    x = arrays.pop('x')
    # The reference is a loop over time, which is compiled either way.
    for implementation in ('chunked',):

      @self.variant
      def run(x, arrays, cotangents, implementation=implementation):
        outputs, pullback = jax.vjp(
          lambda x: api.ssd(x=x, **arrays, dt_softplus=softplus, implementation=implementation), x
        )
        return outputs, pullback(cotangents)[0]

      outputs, dx = run(x, arrays, cotangents)
      assert_close(outputs, expected, rtol=BY_DTYPE['float32'], what=implementation)
      assert_close(dx, expected_gradients['x'], rtol=BY_DTYPE['float32'], what=implementation)
