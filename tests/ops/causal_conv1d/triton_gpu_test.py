"""The GPU kernels: compiled for a Hopper GPU anywhere, and run where there is one."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from ssm_moe.ops import implementation
from ssm_moe.ops.causal_conv1d import api, triton_gpu
from tests import gpu, hopper
from tests.ops.causal_conv1d import cases
from tests.tolerances import BY_DTYPE, assert_close

# Bytes a thread may keep in memory for want of registers.
_NO_SPILLS = 0
_REAL = {'batch': 8, 'length': 2048, 'channels': 2048, 'dtype': 'bfloat16'}
_ALL = {'bias': True, 'state': True, 'segments': True}


def _kernels(case, function=api.causal_conv1d):
  """Compiles what runs forward and backward."""
  arguments, cotangents = jax.eval_shape(
    lambda key: cases.make_arguments(case, key), jax.random.key(0)
  )
  both = functools.partial(cases.value_and_gradients, function, case)
  return hopper.compile_kernels(both, arguments, cotangents)


@hopper.needs_triton
@pytest.mark.parametrize(
  'options',
  [
    {'segments': True},
    {},
    {'activation': None, 'state': True},
    pytest.param({'dtype': 'float32', **_ALL}, marks=pytest.mark.slow),
    *(pytest.param({'width': width, **_ALL}, marks=pytest.mark.slow) for width in (2, 5, 6, 7, 8)),
  ],
  ids=str,
)
def test_real_sizes_compile_without_spills(options):
  kernels = _kernels(cases.Case(name='real', **(_REAL | options)))  # auto takes them
  assert [kernel.name for kernel in kernels] == ['conv_forward', 'conv_backward']
  for kernel in kernels:
    assert kernel.spilled_bytes <= _NO_SPILLS, kernel.name


@hopper.needs_triton
def test_a_thread_moves_eight_bytes_at_a_time():
  for kernel in _kernels(cases.Case(name='real', **_REAL)):
    assert 'ld.global.v2.b32' in kernel.ptx and 'st.global.v2.b32' in kernel.ptx
    assert 'ld.global.b16' not in kernel.ptx and 'st.global.b16' not in kernel.ptx


@hopper.needs_triton
@pytest.mark.parametrize('width', [1, 4])
def test_other_sizes_compile(width):
  case = cases.Case(name='odd', length=1, channels=7, width=width, dtype='float16', **_ALL)
  assert len(_kernels(case, triton_gpu.causal_conv1d)) == 2


@hopper.needs_triton
def test_one_token_is_left_to_the_compiler():
  assert _kernels(cases.Case(name='one', length=1)) == []


def test_it_is_refused_with_a_reason():
  x, kernel = jnp.ones((1, 2, 3)), jnp.ones((4, 3))
  with pytest.raises(NotImplementedError, match=r'triton_gpu.*are for GPUs, and this is for cpu'):
    api.causal_conv1d(x, kernel, implementation='triton_gpu')


@hopper.needs_triton
def test_what_the_kernels_cannot_take_is_refused():
  def supports(*arrays):
    with implementation.compiling_for('gpu'), implementation.on_devices(1):
      return triton_gpu.supports(*arrays)

  x = jnp.zeros((1, 2, 3))
  assert supports(x, jnp.zeros((8, 3)), None, None) is None
  assert '8, not 9' in supports(x, jnp.zeros((9, 3)), None, None)
  assert 'empty' in supports(jnp.zeros((0, 2, 3)), jnp.zeros((4, 3)), None, None)
  assert '65535 rows, not 65536' in supports(jnp.zeros((65536, 1, 1)), jnp.zeros((4, 1)))
  long = jax.ShapeDtypeStruct((1, 2**20, 1024), jnp.bfloat16)
  reasons = []
  jax.eval_shape(lambda x: reasons.append(supports(x, jnp.zeros((4, 1024)))), long)
  assert '2**30' in reasons[0]
  with jax.enable_x64(True):
    assert 'float64' in supports(x, jnp.zeros((4, 3)), jnp.zeros(3, jnp.float64))


class TestOnAGPU:
  pytestmark = gpu.MARKS

  @pytest.mark.parametrize(
    'case',
    [
      *cases.CASES,
      *(
        cases.Case(name=f'many_{dtype}', length=600, channels=200, dtype=dtype, **_ALL)
        for dtype in ('float32', 'bfloat16', 'float16')
      ),
    ],
    ids=lambda case: case.name,
  )
  def test_equals_shifted_in_values_and_gradients(self, case):
    arguments, cotangents, expected = cases.expected_results(case)
    function = functools.partial(api.causal_conv1d, implementation='triton_gpu')
    actual = jax.jit(functools.partial(cases.value_and_gradients, function, case))(
      arguments, cotangents
    )
    assert_close(actual, expected, rtol=BY_DTYPE[case.dtype], what=case.name)

  def test_two_runs_are_equal_to_the_bit(self):
    case = cases.Case(name='twice', length=600, channels=200, dtype='bfloat16', **_ALL)
    arguments, cotangents = cases.make_arguments(case, jax.random.key(1))
    function = functools.partial(api.causal_conv1d, implementation='triton_gpu')
    run = jax.jit(functools.partial(cases.value_and_gradients, function, case))
    chex.assert_trees_all_equal(run(arguments, cotangents), run(arguments, cotangents))
