"""The GPU kernels: compiled for a Hopper GPU anywhere, and run where there is one."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from ssm_moe.ops import implementation
from ssm_moe.ops.selective_scan import api, cases, triton_gpu
from tests import gpu, hopper
from tests.ops.gradients import value_and_gradients
from tests.ops.selective_scan.agreement_test import expected_results
from tests.tolerances import BY_DTYPE, assert_close

_ALL = {'D': True, 'z': True, 'dt_bias': True, 'dt_softplus': True, 'h0': True, 'segments': 9}
_FUSED = {'D': True, 'z': True, 'dt_bias': True, 'dt_softplus': True}
_ONE_ROW = {'batch': 1, 'length': 16384, 'd_inner': 4096}
_REAL = {'batch': 8, 'length': 2048, 'd_inner': 2048, 'd_state': 16}
# Bytes a thread may keep in memory for want of registers: none in what models run.
_NO_SPILLS = 0
_NAMES = ['forward', 'backward', 'add_parts']
_NAMES_IN_PIECES = ['carry', 'forward', 'carry', 'backward', 'add_parts']


def _kernels(case):
  """Compiles what runs forward and backward."""
  names = [
    name
    for name, value in jax.eval_shape(
      lambda: {
        k: v
        for k, v in cases.make_inputs(case, jax.random.key(0)).items()
        if isinstance(v, jax.Array)
      }
    ).items()
    if value is not None
  ]

  def make(key):
    arguments = cases.make_inputs(case, key)
    return {name: arguments[name] for name in names}, cases.make_cotangents(case, key)

  def both(arguments, cotangents):
    ids = arguments.pop('segment_ids', None)
    outputs, pullback = jax.vjp(
      lambda arguments: api.selective_scan(
        **arguments, segment_ids=ids, dt_softplus=case.dt_softplus
      ),
      arguments,
    )
    return outputs, pullback(cotangents)

  return hopper.compile_kernels(both, *jax.eval_shape(make, jax.random.key(0)))


@hopper.needs_triton
@pytest.mark.parametrize(
  ('options', 'names'),
  [
    (_ALL, _NAMES),
    pytest.param({}, _NAMES, marks=pytest.mark.slow),
    ({**_FUSED, **_ONE_ROW}, _NAMES_IN_PIECES),
    pytest.param({**_ALL, **_ONE_ROW}, _NAMES_IN_PIECES, marks=pytest.mark.slow),
  ],
  ids=['all', 'plain', 'long', 'long_all'],
)
def test_real_sizes_compile_without_spills(options, names):
  kernels = _kernels(cases.Case(name='real', dtype='bfloat16', **(_REAL | options)))
  assert [kernel.name for kernel in kernels] == names  # and auto takes them
  for kernel in kernels:
    assert kernel.spilled_bytes <= _NO_SPILLS, kernel.name


@hopper.needs_triton
@pytest.mark.parametrize(
  'sizes',
  [
    {'d_inner': 100, 'length': 77, 'd_state': 12},
    pytest.param({'d_inner': 3, 'length': 1, 'd_state': 1}, marks=pytest.mark.slow),
    pytest.param(
      {'d_inner': 40, 'length': 20, 'd_state': 64, 'dtype': 'float16'}, marks=pytest.mark.slow
    ),
  ],
  ids=['odd', 'one', 'state_64'],
)
def test_other_sizes_compile(sizes):
  names = [kernel.name for kernel in _kernels(cases.Case(name='other', **sizes, **_ALL))]
  assert sorted(set(names)) == sorted(_NAMES)


def test_few_programs_take_pieces_of_time_and_more_threads_for_a_channel():
  def split(*sizes):
    forward, backward, _ = triton_gpu.default_block_sizes(*sizes)
    assert forward.states_per_thread == backward.states_per_thread
    assert forward.pieces == backward.pieces
    return forward.pieces, forward.states_per_thread

  assert split(8, 2048, 2048, 16) == (1, 8)
  assert split(1, 16384, 4096, 16) == (4, 8)
  assert split(1, 16384, 4096, 32) == (2, 8)
  assert split(1, 500, 4096, 16) == (1, 4)
  assert split(1, 1500, 512, 16) == (2, 4)
  assert split(1, 16, 8, 8) == (1, 4)


def test_states_are_kept_where_the_backward_kernel_begins_a_tile():
  case = cases.CASES[0]
  arguments = cases.make_inputs(case, jax.random.key(0))
  sizes = tuple(triton_gpu.BlockSizes(tile=tile) for tile in (16, 32, 32))
  with pytest.raises(ValueError, match='tiles of 16 tokens forward are no whole number'):
    triton_gpu.selective_scan(**arguments, block_sizes=sizes)


def test_it_is_refused_with_a_reason():
  arguments = cases.make_inputs(cases.CASES[0], jax.random.key(0))
  with pytest.raises(NotImplementedError, match=r'triton_gpu.*are for GPUs, and this is for cpu'):
    api.selective_scan(**arguments, implementation='triton_gpu')


@hopper.needs_triton
def test_float64_and_large_states_are_refused():
  def supports(**arrays):
    with implementation.compiling_for('gpu'), implementation.on_devices(1):
      return triton_gpu.supports(*arrays.values())

  x = jnp.zeros((1, 2, 4))
  row = jnp.zeros((1, 2, 257))
  assert supports(x=x, dt=x, A=jnp.zeros((4, 256)), B=row, C=row) is None
  assert '256, not 257' in supports(x=x, dt=x, A=jnp.zeros((4, 257)), B=row, C=row)
  with jax.enable_x64(True):
    wide = jnp.zeros((1, 2, 4), jnp.float64)
    assert 'float64' in supports(x=wide, dt=x, A=jnp.zeros((4, 256)), B=row, C=row)


class TestOnAGPU:
  pytestmark = gpu.MARKS

  @pytest.mark.parametrize(
    'case',
    [
      *cases.CASES,
      cases.Case(name='many', length=300, d_inner=130, d_state=16, dtype='bfloat16', **_ALL),
      cases.Case(name='odd_state', length=37, d_inner=35, d_state=20, **_ALL),
      cases.Case(name='state_64', length=70, d_inner=33, d_state=64, **_ALL),
      cases.Case(name='state_256', length=40, d_inner=9, d_state=256, **_ALL),
      cases.Case(name='state_16', length=513, d_inner=64, d_state=16, **_ALL),
      cases.Case(name='state_16', length=513, d_inner=64, d_state=16, dtype='float16', **_ALL),
      cases.Case(
        name='enough', length=40, batch=20, d_inner=520, d_state=16, dtype='bfloat16', **_ALL
      ),
    ],
    ids=lambda case: case.name,
  )
  def test_equals_reference_in_values_and_gradients(self, case):
    arguments, cotangents, expected = expected_results(case)
    scan = functools.partial(api.selective_scan, implementation='triton_gpu')
    actual = value_and_gradients(scan, arguments, cotangents)
    assert_close(actual, expected, rtol=BY_DTYPE[case.dtype], what=case.name)

  @pytest.mark.parametrize(
    ('case', 'pieces'),
    [
      (cases.Case(name='all', length=333, d_inner=40, d_state=16, **_ALL), (3, 3)),
      (cases.Case(name='none', length=333, d_inner=40, d_state=16), (2, 5)),
      (cases.Case(name='state_8', length=200, d_inner=24, d_state=8, **_FUSED), (5, 2)),
      (cases.Case(name='state_32', length=129, d_inner=20, d_state=32, **_ALL), (2, 2)),
      (
        cases.Case(name='half', length=300, d_inner=40, d_state=16, dtype='float16', **_ALL),
        (3, 5),
      ),
    ],
    ids=lambda v: v.name if isinstance(v, cases.Case) else None,
  )
  def test_pieces_of_time_equal_reference(self, case, pieces):
    arguments, cotangents, expected = expected_results(case)
    *sizes, carry = triton_gpu.default_block_sizes(8, 2048, 2048, max(8, case.d_state))
    sizes = [dataclasses.replace(each, pieces=p) for each, p in zip(sizes, pieces)]
    scan = functools.partial(triton_gpu.selective_scan, block_sizes=(*sizes, carry))
    actual = value_and_gradients(scan, arguments, cotangents)
    assert_close(actual, expected, rtol=BY_DTYPE[case.dtype], what=case.name)

  @pytest.mark.parametrize('shift', [0.0, 2.0], ids=['slow', 'fast'])
  def test_what_pieces_hand_on_may_end_early(self, shift):
    case = cases.Case(name='early', length=1500, d_inner=40, d_state=16, h0=True, **_FUSED)
    arguments = cases.make_inputs(case, jax.random.key(0))
    arguments['dt'] = arguments['dt'] + shift
    cotangents = cases.make_cotangents(case, jax.random.key(1))
    actual, expected = (
      value_and_gradients(
        functools.partial(api.selective_scan, implementation=implementation), arguments, cotangents
      )
      for implementation in ('triton_gpu', 'chunked')
    )
    assert_close(actual, expected, rtol=BY_DTYPE[case.dtype])

  @pytest.mark.parametrize('length', [300, 2049])
  def test_two_runs_are_equal_to_the_bit(self, length):
    case = cases.Case(
      name='twice', length=length, d_inner=130, d_state=16, dtype='bfloat16', **_ALL
    )
    arguments = cases.make_inputs(case, jax.random.key(1))
    cotangents = cases.make_cotangents(case, jax.random.key(2))
    scan = functools.partial(api.selective_scan, implementation='triton_gpu')
    first, second = (value_and_gradients(scan, arguments, cotangents) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
