"""Every implementation equals the reference on every case: values, and gradients of all inputs."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from ssm_moe.ops import implementation as implementation_lib
from ssm_moe.ops.selective_scan import api, cases, chunked, pallas_tpu
from tests.ops.gradients import value_and_gradients
from tests.tolerances import BY_DTYPE, assert_close

FAST = ('chunked', 'associative')
FUNCTIONS = {name: functools.partial(api.selective_scan, implementation=name) for name in FAST} | {
  'pallas_tpu': functools.partial(pallas_tpu.selective_scan, interpret=True)
}


@functools.cache
def expected_results(case):
  arguments = cases.make_inputs(case, jax.random.key(1))
  cotangents = cases.make_cotangents(case, jax.random.key(2))
  reference = functools.partial(api.selective_scan, implementation='reference')
  return arguments, cotangents, value_and_gradients(reference, arguments, cotangents)


# An argument alone, which the cases with all of them cover too.
_EXTENDED = ('skip', 'gate', 'state')
# A bias without softplus, a softplus without bias, documents without a first state.
_SLOW = ('bias', 'softplus', 'segments')
CASES = [
  pytest.param(
    case,
    marks=[pytest.mark.extended] * case.name.startswith(_EXTENDED)
    + [pytest.mark.slow] * case.name.startswith(_SLOW),
  )
  for case in cases.CASES
]


@pytest.mark.parametrize('implementation', FUNCTIONS)
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_equals_reference_in_values_and_gradients(case, implementation):
  arguments, cotangents, expected = expected_results(case)
  actual = value_and_gradients(FUNCTIONS[implementation], arguments, cotangents)
  (y, h), gradients = actual
  chex.assert_type(y, arguments['x'].dtype)
  chex.assert_type(h, jnp.float32)
  for name, gradient in gradients.items():
    chex.assert_type(gradient, arguments[name].dtype)
  assert_close(actual, expected, rtol=BY_DTYPE[case.dtype], what=case.name)


@pytest.mark.parametrize('name', ['all_129', 'plain_7'])
def test_chunks_as_they_are_carried_on_a_tpu(name):
  case = next(case for case in cases.CASES if case.name == name)
  arguments, cotangents, expected = expected_results(case)

  def time_first(**arguments):
    with implementation_lib.compiling_for('tpu'):
      return chunked.selective_scan(**arguments)

  actual = value_and_gradients(time_first, arguments, cotangents)
  assert_close(actual, expected, rtol=BY_DTYPE[case.dtype])


@pytest.mark.parametrize(
  'chunk_size', [5, *(pytest.param(q, marks=pytest.mark.extended) for q in (1, 16, 129, 1000))]
)
def test_result_does_not_depend_on_chunk_size(chunk_size):
  case = next(case for case in cases.CASES if case.name == 'all_129')
  arguments, cotangents, expected = expected_results(case)
  function = functools.partial(chunked.selective_scan, chunk_size=chunk_size)
  actual = value_and_gradients(function, arguments, cotangents)
  assert_close(actual, expected, rtol=BY_DTYPE[case.dtype])


class WithAndWithoutJit(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_equals_reference(self):
    case = cases.Case(
      name='jit', length=7, D=True, z=True, dt_bias=True, dt_softplus=True, h0=True, segments=2
    )
    arguments, cotangents, (expected, expected_gradients) = expected_results(case)
    softplus = arguments['dt_softplus']
    arrays = {name: v for name, v in arguments.items() if name != 'dt_softplus'}
    x = arrays.pop('x')
    for implementation in ('reference', *FAST):

      @self.variant
      def run(x, arrays, cotangents, implementation=implementation):
        outputs, pullback = jax.vjp(
          lambda x: api.selective_scan(
            x=x, **arrays, dt_softplus=softplus, implementation=implementation
          ),
          x,
        )
        return outputs, pullback(cotangents)[0]

      outputs, dx = run(x, arrays, cotangents)
      assert_close(outputs, expected, rtol=BY_DTYPE['float32'], what=implementation)
      assert_close(dx, expected_gradients['x'], rtol=BY_DTYPE['float32'], what=implementation)
