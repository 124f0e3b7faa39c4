"""The TPU kernel over many blocks, compiled for real chips, and refused where it cannot run.

That it equals the reference on the common cases is in `agreement_test`, with the others.
"""

import jax
import jax.numpy as jnp
import pytest

from ssm_moe.ops import implementation
from ssm_moe.ops.selective_scan import api, cases, pallas_tpu
from tests import tpu
from tests.ops.gradients import value_and_gradients
from tests.ops.selective_scan.agreement_test import FUNCTIONS, expected_results
from tests.tolerances import FLOAT32_REORDERED, assert_close

_ALL = {'D': True, 'z': True, 'dt_bias': True, 'dt_softplus': True, 'h0': True, 'segments': 9}


@pytest.mark.parametrize(
  'case',
  [
    # Three blocks of time and two of channels, each with padding; so are the states.
    cases.Case(name='blocks', length=300, d_inner=600, d_state=20, batch=2, **_ALL),
    cases.Case(name='large_state', length=20, d_inner=130, d_state=256, batch=1, **_ALL),
  ],
  ids=lambda case: case.name,
)
def test_equals_reference_over_many_blocks(case):
  arguments, cotangents, expected = expected_results(case)
  actual = value_and_gradients(FUNCTIONS['pallas_tpu'], arguments, cotangents)
  assert_close(actual, expected, rtol=FLOAT32_REORDERED, what=case.name)


def test_blocks_of_channels_are_whole_registers_and_even():
  # 8192 states and channels: 512 channels of 16 states, 128 of 64 and of more.
  assert pallas_tpu._block_channels(4096, 16) == 512
  assert pallas_tpu._block_channels(640, 16) == 384  # two of 384, not 512 and 128
  assert pallas_tpu._block_channels(1, 16) == 128
  assert pallas_tpu._block_channels(4096, 256) == 128


def test_it_is_refused_with_a_reason():
  arguments = cases.make_inputs(cases.CASES[0], jax.random.key(0))
  with pytest.raises(NotImplementedError, match=r'pallas_tpu.*needs a TPU, and this is for'):
    api.selective_scan(**arguments, implementation='pallas_tpu')
  with implementation.compiling_for('tpu'):
    assert pallas_tpu.supports(arguments['x'], None) is None
    assert 'no float16' in pallas_tpu.supports(arguments['x'].astype(jnp.float16))


def _compiled(case, *, name, implementation='pallas_tpu'):
  """Returns the forward and backward pass of `case`, compiled for one chip."""
  arguments = jax.eval_shape(lambda key: _arrays(case, key), jax.random.key(0))
  cotangents = jax.eval_shape(lambda key: cases.make_cotangents(case, key), jax.random.key(0))

  def both(arguments, cotangents):
    ids = arguments.pop('segment_ids', None)
    outputs, pullback = jax.vjp(
      lambda arguments: api.selective_scan(
        **arguments,
        segment_ids=ids,
        dt_softplus=case.dt_softplus,
        implementation=implementation,
      ),
      arguments,
    )
    return outputs, pullback(cotangents)

  return tpu.compile_for_one(both, arguments, cotangents, name=name)


def _arrays(case, key):
  arguments = cases.make_inputs(case, key)
  return {k: v for k, v in arguments.items() if k != 'dt_softplus' and v is not None}


_REAL = {'batch': 1, 'length': 4096, 'd_inner': 4096, 'd_state': 16}


@pytest.mark.parametrize('name', ['v5e:2x2', 'v6e:2x2'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@tpu.needs_compiler
def test_real_sizes_compile(name, dtype):
  compiled = _compiled(cases.Case(name='real', dtype=dtype, **_REAL, **_ALL), name=name)
  kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
  assert kernels == 2  # one each way
  # Beside inputs and outputs: B and C with time last, their gradients by group, and the states
  # before the blocks of time. Less than one more array of tokens and channels.
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4096 * 4096


@pytest.mark.parametrize(
  ('sizes', 'options'),
  [
    ({'d_inner': 100, 'length': 77}, _ALL),
    ({'d_inner': 256, 'length': 1}, {}),
    ({'d_inner': 384, 'length': 300, 'd_state': 1}, {'z': True}),
    ({'d_inner': 256, 'length': 256, 'd_state': 256}, _ALL),
  ],
  ids=['odd', 'one_token', 'one_state', 'large_state'],
)
@tpu.needs_compiler
def test_other_sizes_compile(sizes, options):
  _compiled(cases.Case(name='other', dtype='bfloat16', **sizes, **options), name='v5e:2x2')


@tpu.needs_compiler
def test_auto_takes_the_chunked_form_until_a_chip_has_timed_the_kernel():
  case = cases.Case(name='auto', length=128, d_inner=128, d_state=16)
  compiled = _compiled(case, name='v5e:2x2', implementation='auto')
  assert 'tpu_custom_call' not in compiled.as_text()
