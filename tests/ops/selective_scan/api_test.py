"""Bad arguments are answered with one line that names the argument and what is allowed."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from ssm_moe.ops import selective_scan as room
from ssm_moe.ops.selective_scan import cases

CASE = cases.Case(
  name='api', length=5, D=True, z=True, dt_bias=True, dt_softplus=True, h0=True, segments=2
)


def run(**changes):
  # Where types are checked at run time, they would answer before the function does.
  return inspect.unwrap(room.selective_scan)(
    **{**cases.make_inputs(CASE, jax.random.key(0)), **changes}
  )


@pytest.mark.parametrize(
  'name', ['x', 'dt', 'A', 'B', 'C', 'D', 'z', 'dt_bias', 'segment_ids', 'h0']
)
def test_wrong_shape_names_the_argument_and_the_axes(name):
  value = cases.make_inputs(CASE, jax.random.key(0))[name]
  longer = jnp.concatenate([value, value], axis=-1)
  # x and A set the sizes that the others must have.
  culprit = {'x': 'dt', 'A': 'B'}.get(name, name)
  with pytest.raises(ValueError, match=rf'^selective_scan: {culprit} has shape .*must be \[') as e:
    run(**{name: longer})
  assert '\n' not in str(e.value)


def test_no_tokens():
  with pytest.raises(ValueError, match='at least one token'):
    run(x=jnp.zeros((2, 0, 6)))


def test_wrong_rank():
  with pytest.raises(ValueError, match=r'x has shape \(5, 6\); it must be \[B, L, D\]'):
    run(x=jnp.zeros((5, 6)))
  with pytest.raises(ValueError, match=r'A has shape \(6,\); it must be \[D, N\]'):
    run(A=jnp.zeros((6,)))


def test_wrong_dtype():
  with pytest.raises(TypeError, match='x is int32; it must be floating point'):
    run(x=jnp.zeros((2, 5, 6), jnp.int32))
  with pytest.raises(TypeError, match='segment_ids is float32; it must be integer'):
    run(segment_ids=jnp.zeros((2, 5)))


def test_unknown_implementation_names_those_there_are():
  with pytest.raises(
    ValueError, match=r"no implementation 'fast'; there are: auto, triton_gpu, chunked"
  ):
    run(implementation='fast')


def test_auto_runs_chunked():
  assert all(map(jnp.array_equal, run(), run(implementation='chunked')))
