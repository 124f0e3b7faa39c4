"""The memory of the chunked scan, and that strong decays do no harm to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.ops.selective_scan import cases, chunked, reference
from tests.tolerances import FLOAT32_REORDERED, assert_close


def temporary_floats(case):
  """Returns the temporaries of value and gradients, in floats, and the size of all inputs."""
  arguments = cases.make_inputs(case, jax.random.key(8))
  floating = {name: arguments[name] for name in ('x', 'dt', 'A', 'B', 'C')}

  def loss(floating):
    y, h = chunked.selective_scan(**floating)
    return jnp.sum(y**2) + jnp.sum(h**2)

  compiled = jax.jit(jax.value_and_grad(loss)).lower(floating).compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes / 4
  return temporaries, sum(v.size for v in floating.values())


@pytest.mark.parametrize('d_state', [4, 16])
@pytest.mark.parametrize('length', [512, 2048])
def test_temporaries_hold_chunks_not_the_sequence(length, d_state):
  case = cases.Case(name='memory', length=length, d_inner=64, d_state=d_state)
  temporaries, inputs = temporary_floats(case)
  state = case.batch * case.d_inner * d_state
  chunk = chunked.CHUNK_SIZE
  # Three stacks of a chunk: decays, states and their cotangents. One more for what XLA adds.
  assert temporaries <= 2 * inputs + (length // chunk + 4 * chunk) * state
  # What autodiff of a loop over time would hold at the least.
  assert length == 512 or temporaries < length * state


def test_temporaries_of_the_benchmark_are_at_most_100_mib():
  temporaries, _ = temporary_floats(cases.BENCHMARK_CASE)
  assert temporaries * 4 <= 100 * 2**20


def test_decay_to_zero_in_one_step_gives_finite_gradients():
  case = cases.Case(name='fast', length=40, h0=True)
  arguments = cases.make_inputs(case, jax.random.key(9))
  arguments = {name: arguments[name] for name in ('x', 'dt', 'A', 'B', 'C', 'h0')}
  arguments['A'] = arguments['A'] * 1e4  # exp underflows

  def gradients(scan):
    def loss(arguments):
      y, h = scan(**arguments)
      return jnp.sum(y**2) + jnp.sum(h**2)

    return jax.jit(jax.grad(loss))(arguments)

  actual = gradients(chunked.selective_scan)
  assert_close(actual, gradients(reference.selective_scan), rtol=FLOAT32_REORDERED)


def test_same_result_over_a_mapped_axis():
  case = cases.Case(name='map', batch=2, length=37, h0=True)
  arguments = cases.make_inputs(case, jax.random.key(9))
  arrays = {name: arguments[name] for name in ('x', 'dt', 'B', 'C', 'h0')}

  def loss(arrays):
    y, h = chunked.selective_scan(**arrays, A=arguments['A'])
    return jnp.sum(y**2) + jnp.sum(h**2)

  gradients = jax.grad(loss)
  expected = jax.jit(gradients)(arrays)
  rows = jax.tree.map(lambda v: v[:, None], arrays)
  actual = jax.jit(jax.vmap(gradients))(rows)
  assert_close(
    jax.tree.map(lambda v: np.asarray(v[:, 0]), actual), expected, rtol=FLOAT32_REORDERED
  )
