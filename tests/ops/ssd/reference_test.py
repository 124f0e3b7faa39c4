"""The reference itself: against a NumPy loop, a closed form, another scan, finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.ops.selective_scan import selective_scan
from ssm_moe.ops.ssd import api, cases
from tests.tolerances import FLOAT32_REORDERED, FLOAT64_FINITE_DIFFERENCE, assert_close


def numpy_ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, segment_ids, h0):
  """The recurrence for each batch row, token, head, head channel and state, in float64."""
  batch, length, num_heads, head_dim = x.shape
  num_groups, d_state = B.shape[2:]
  y = np.zeros(x.shape)
  h = np.zeros((batch, num_heads, head_dim, d_state)) if h0 is None else np.array(h0)
  for b in range(batch):
    for t in range(length):
      if segment_ids is not None and t > 0 and segment_ids[b, t] != segment_ids[b, t - 1]:
        h[b] = 0
      for i in range(num_heads):
        group = i // (num_heads // num_groups)
        step = float(dt[b, t, i]) + (0.0 if dt_bias is None else float(dt_bias[i]))
        if dt_softplus:
          step = np.log1p(np.exp(step))
        for p in range(head_dim):
          for n in range(d_state):
            h[b, i, p, n] *= np.exp(step * A[i])
            h[b, i, p, n] += step * B[b, t, group, n] * x[b, t, i, p]
            y[b, t, i, p] += C[b, t, group, n] * h[b, i, p, n]
          if D is not None:
            y[b, t, i, p] += D[i] * x[b, t, i, p]
  return y, h


@pytest.mark.parametrize('name', ['all_7', 'all_129', 'bias_129', 'one_of_each_129'])
def test_equals_a_numpy_loop(name):
  case = next(case for case in cases.CASES if case.name == name)
  arguments = cases.make_inputs(case, jax.random.key(3))
  in_numpy = {
    name: np.asarray(v, np.float64) if isinstance(v, jax.Array) else v
    for name, v in arguments.items()
  }
  actual = api.ssd(**arguments, implementation='reference')
  assert_close(actual, numpy_ssd(**in_numpy), rtol=FLOAT32_REORDERED)


def test_is_the_selective_scan_whose_channels_share_decays():
  # Mamba-1's scan with A the same for all states of a channel and dt the same for all channels of a
  # head, and one group of B and C.
  case = cases.Case(
    name='same', length=30, num_groups=1, D=True, dt_bias=True, dt_softplus=True, h0=True
  )
  arguments = cases.make_inputs(case, jax.random.key(8))
  d_inner = case.num_heads * case.head_dim

  def by_channel(v):
    return jnp.repeat(v, case.head_dim, axis=-1)

  y, h = selective_scan(
    arguments['x'].reshape(case.batch, case.length, d_inner),
    by_channel(arguments['dt']),
    jnp.broadcast_to(by_channel(arguments['A'])[:, None], (d_inner, case.d_state)),
    arguments['B'][:, :, 0],
    arguments['C'][:, :, 0],
    D=by_channel(arguments['D']),
    dt_bias=by_channel(arguments['dt_bias']),
    dt_softplus=True,
    h0=arguments['h0'].reshape(case.batch, d_inner, case.d_state),
    implementation='reference',
  )
  actual = api.ssd(**arguments, implementation='reference')
  expected = (y.reshape(actual[0].shape), h.reshape(actual[1].shape))
  assert_close(actual, expected, rtol=FLOAT32_REORDERED)


@pytest.mark.parametrize('implementation', ['reference', 'chunked'])
def test_constant_coefficients_give_a_geometric_series(implementation):
  # With x = B = C = 1 and one dt: h_t = dt (1 + a + ... + a^(t-1)) + a^t h0, with a = exp(dt A).
  length, dt, A, h0 = 150, 0.1, -0.7, 3.0
  ones = jnp.ones((1, length, 1, 1))
  y, h = api.ssd(
    ones,
    dt * ones[:, :, :, 0],
    jnp.full((1,), A),
    ones,
    ones,
    h0=jnp.full((1, 1, 1, 1), h0),
    implementation=implementation,
  )
  a, t = np.exp(dt * A), np.arange(1, length + 1)
  expected = dt * (1 - a**t) / (1 - a) + a**t * h0
  assert_close(y[0, :, 0, 0], expected, rtol=FLOAT32_REORDERED)
  assert_close(h[0, 0, 0, 0], expected[-1], rtol=FLOAT32_REORDERED)


@pytest.mark.parametrize('implementation', ['reference', 'chunked'])
@pytest.mark.parametrize('options', ['all', 'plain'])
def test_gradient_of_each_input_equals_finite_differences(options, implementation):
  """The derivative along a random direction, for one input at a time, in float64."""
  with jax.enable_x64(True):
    fused = {'D': True, 'dt_bias': True, 'dt_softplus': True, 'segments': 3}
    case = cases.Case(
      name=options,
      length=37,
      dtype='float64',
      h0=True,
      **(fused if options == 'all' else {}),
    )
    arguments = cases.make_inputs(case, jax.random.key(4))
    dy, dh = cases.make_cotangents(case, jax.random.key(5))
    softplus = arguments.pop('dt_softplus')
    segment_ids = arguments.pop('segment_ids')
    floating = {name: v for name, v in arguments.items() if v is not None}
    ssd = functools.partial(
      api.ssd, dt_softplus=softplus, segment_ids=segment_ids, implementation=implementation
    )

    @jax.jit
    def loss(floating):
      y, h = ssd(**floating)
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
