"""The reference itself: against a NumPy loop, a closed form, and float64 finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.ops.selective_scan import api, cases
from tests.tolerances import FLOAT32_REORDERED, FLOAT64_FINITE_DIFFERENCE, assert_close


def numpy_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, h0):
  """The recurrence for each batch row, token, channel and state, in float64."""
  batch, length, d_inner = x.shape
  d_state = A.shape[1]
  y = np.zeros(x.shape)
  h = np.zeros((batch, d_inner, d_state)) if h0 is None else np.array(h0, np.float64)
  for b in range(batch):
    for t in range(length):
      if segment_ids is not None and t > 0 and segment_ids[b, t] != segment_ids[b, t - 1]:
        h[b] = 0
      for d in range(d_inner):
        step = float(dt[b, t, d]) + (0.0 if dt_bias is None else float(dt_bias[d]))
        if dt_softplus:
          step = np.log1p(np.exp(step))
        for n in range(d_state):
          h[b, d, n] *= np.exp(step * A[d, n])
          h[b, d, n] += step * B[b, t, n] * x[b, t, d]
          y[b, t, d] += C[b, t, n] * h[b, d, n]
        if D is not None:
          y[b, t, d] += D[d] * x[b, t, d]
        if z is not None:
          y[b, t, d] *= z[b, t, d] / (1 + np.exp(-z[b, t, d]))
  return y, h


@pytest.mark.parametrize('name', ['plain_129', 'all_129', 'bias_129', 'one_channel_129'])
def test_equals_a_numpy_loop(name):
  case = next(case for case in cases.CASES if case.name == name)
  arguments = cases.make_inputs(case, jax.random.key(3))
  in_numpy = {
    name: np.asarray(v, np.float64) if isinstance(v, jax.Array) else v
    for name, v in arguments.items()
  }
  actual = api.selective_scan(**arguments, implementation='reference')
  assert_close(actual, numpy_scan(**in_numpy), rtol=FLOAT32_REORDERED)


@pytest.mark.parametrize('implementation', ['reference', 'associative', 'chunked'])
def test_constant_coefficients_give_a_geometric_series(implementation):
  # With x = B = C = 1 and one dt: h_t = dt (1 + a + ... + a^(t-1)) + a^t h0, with a = exp(dt A).
  length, dt, A, h0 = 70, 0.1, -0.7, 3.0
  ones = jnp.ones((1, length, 1))
  y, h = api.selective_scan(
    ones,
    dt * ones,
    jnp.full((1, 1), A),
    ones,
    ones,
    h0=jnp.full((1, 1, 1), h0),
    implementation=implementation,
  )
  a, t = np.exp(dt * A), np.arange(1, length + 1)
  expected = dt * (1 - a**t) / (1 - a) + a**t * h0
  assert_close(y[0, :, 0], expected, rtol=FLOAT32_REORDERED)
  assert_close(h[0, 0, 0], expected[-1], rtol=FLOAT32_REORDERED)


@pytest.mark.parametrize('implementation', ['reference', 'chunked'])
@pytest.mark.parametrize('options', ['all', 'plain'])
def test_gradient_of_each_input_equals_finite_differences(options, implementation):
  """The derivative along a random direction, for one input at a time, in float64."""
  with jax.enable_x64(True):
    fused = {'D': True, 'z': True, 'dt_bias': True, 'dt_softplus': True, 'segments': 3}
    case = cases.Case(
      name=options,
      length=37,
      d_inner=3,
      dtype='float64',
      h0=True,
      **(fused if options == 'all' else {}),
    )
    arguments = cases.make_inputs(case, jax.random.key(4))
    dy, dh = cases.make_cotangents(case, jax.random.key(5))
    softplus = arguments.pop('dt_softplus')
    segment_ids = arguments.pop('segment_ids')
    floating = {name: v for name, v in arguments.items() if v is not None}
    scan = functools.partial(
      api.selective_scan,
      dt_softplus=softplus,
      segment_ids=segment_ids,
      implementation=implementation,
    )

    @jax.jit
    def loss(floating):
      y, h = scan(**floating)
      return jnp.sum(y * dy) + jnp.sum(h * dh)

    gradients = jax.jit(jax.grad(loss))(floating)
    assert loss(floating).dtype == jnp.float64
    for i, (name, value) in enumerate(floating.items()):
      direction = jax.random.normal(jax.random.key(10 + i), value.shape, jnp.float64)
      step = 1e-6
      above = loss({**floating, name: value + step * direction})
      below = loss({**floating, name: value - step * direction})
      assert_close(
        jnp.sum(gradients[name] * direction),
        (above - below) / (2 * step),
        rtol=FLOAT64_FINITE_DIFFERENCE,
        what=name,
      )
