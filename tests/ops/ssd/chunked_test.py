"""The memory of the chunked form, and that strong decays and long sequences do no harm to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.ops.ssd import cases, chunked, reference
from tests.tolerances import FLOAT32_REORDERED, assert_close


def outputs_and_gradients(ssd, arguments):
  """Returns y and last state, and the gradients of the sum of their squares."""

  @jax.jit
  def run(arguments):
    def loss(arguments):
      y, h = ssd(**arguments)
      return jnp.sum(y**2) + jnp.sum(h**2), (y, h)

    gradients, outputs = jax.grad(loss, has_aux=True)(arguments)
    return outputs, gradients

  return run(arguments)


def floating_arguments(case, seed=9):
  arguments = cases.make_inputs(case, jax.random.key(seed))
  names = ('x', 'dt', 'A', 'B', 'C') + (('h0',) if case.h0 else ())
  return {name: arguments[name] for name in names}


@pytest.mark.parametrize('length', [1024, 4096])
def test_temporaries_hold_chunks_not_the_sequence(length):
  case = cases.Case(name='memory', length=length, num_heads=4, head_dim=16, d_state=32)
  arguments = floating_arguments(case)
  chunk = chunked.CHUNK_SIZE

  def loss(arguments):
    y, h = chunked.ssd(**arguments)
    return jnp.sum(y**2) + jnp.sum(h**2)

  compiled = jax.jit(jax.value_and_grad(loss)).lower(arguments).compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes / 4
  inputs = sum(v.size for v in arguments.values())
  state = case.batch * case.num_heads * case.head_dim * case.d_state
  square = case.batch * case.num_heads * chunk**2
  # The inputs in the order of the loop, y and all their cotangents; the states before the chunks
  # and what the loop adds; of the chunk at work, the decays and what they multiply.
  assert temporaries <= 5 * inputs + 2 * (length // chunk) * state + 10 * square
  # What autodiff of a loop over time would hold at the least, and what all chunks at once would.
  assert length < 4096 or temporaries < min(length * state, (length // chunk) * square)


@pytest.mark.parametrize('strength', [30.0, 1e6])
def test_strong_decay_equals_the_reference(strength):
  # Every third step wipes the state out, and those between hardly decay: differences of one running
  # sum would be off by more than the slow decays.
  case = cases.Case(name='strong', length=200, h0=True)
  arguments = floating_arguments(case)
  strong = jnp.where(jnp.arange(case.length) % 3 == 0, strength, 1.0)
  arguments['dt'] = arguments['dt'] * strong[None, :, None]
  expected = outputs_and_gradients(reference.ssd, arguments)
  actual = outputs_and_gradients(chunked.ssd, arguments)
  assert_close(actual, expected, rtol=FLOAT32_REORDERED)


def test_slow_decay_after_strong_decay_is_exact():
  # a_t is -1000 for 100 steps and then -1e-4, -1e-4, ...: with x = B = C = 1 and dt = -a,
  # the state after k slow steps is 1e-4 (1 + r + ... + r^(k-1)) + 1000 r^k with r = exp(-1e-4).
  slow = 28
  dt = jnp.concatenate([jnp.full((100,), 1000.0), jnp.full((slow,), 1e-4)])
  ones = jnp.ones((1, 100 + slow, 1, 1))
  y, _ = chunked.ssd(ones, dt[None, :, None], -jnp.ones((1,)), ones, ones)
  k = np.arange(1, slow + 1)
  r = np.exp(-1e-4)
  expected = 1e-4 * (1 - r**k) / (1 - r) + 1000 * r**k
  # What decays is compared, 1000 (1 - r^k) of at most 2.8.
  np.testing.assert_allclose(1000 - y[0, 100:, 0, 0], 1000 - expected, atol=2e-4)


def test_long_sequence_stays_finite_and_exact():
  case = cases.Case(name='long', length=5000, num_heads=2, head_dim=2, num_groups=1, d_state=2)
  arguments = floating_arguments(case)
  # One head forgets in a few steps, one keeps what it saw over the whole sequence.
  arguments['A'] = jnp.array([-16.0, -1e-3])
  actual = outputs_and_gradients(chunked.ssd, arguments)
  # In float32 the loop itself is off: its decays are rounded 5000 times in a row.
  with jax.enable_x64(True):
    in_float64 = jax.tree.map(lambda v: jnp.asarray(np.asarray(v), jnp.float64), arguments)
    expected = outputs_and_gradients(reference.ssd, in_float64)
  assert_close(actual, expected, rtol=FLOAT32_REORDERED)


def test_same_result_over_a_mapped_axis():
  case = cases.Case(name='map', batch=2, length=37, h0=True)
  arguments = floating_arguments(case)
  A = arguments.pop('A')

  def loss(arrays):
    y, h = chunked.ssd(**arrays, A=A)
    return jnp.sum(y**2) + jnp.sum(h**2)

  gradients = jax.grad(loss)
  expected = jax.jit(gradients)(arguments)
  rows = jax.tree.map(lambda v: v[:, None], arguments)
  actual = jax.jit(jax.vmap(gradients))(rows)
  assert_close(jax.tree.map(lambda v: v[:, 0], actual), expected, rtol=FLOAT32_REORDERED)
