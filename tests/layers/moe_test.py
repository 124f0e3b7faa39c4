import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.config import MoEConfig
from ssm_moe.layers import initializers
from ssm_moe.layers.moe import MoE
from ssm_moe.layers.router import Routing
from tests import tolerances

_SHAPE = (2, 12, 8)


def _layer(**fields):
  config = MoEConfig(num_experts=4, d_ff=16, **fields)
  init = initializers.linear(8)
  return MoE(config, router_init=init, wi_init=init, wo_init=init, dtype=jnp.dtype('float32'))


@pytest.mark.parametrize(
  ('dispatch', 'top_k'),
  [
    ('dropless', 2),
    ('capacity', 2),
    pytest.param('dropless', 1, marks=pytest.mark.slow),
    pytest.param('capacity', 1, marks=pytest.mark.slow),
  ],
)
def test_dispatchers_agree_when_nothing_is_dropped(rng, dispatch, top_k):
  x = jax.random.normal(rng, _SHAPE)
  dense = _layer(dispatch='dense', top_k=top_k)
  variables = jax.jit(dense.init)(rng, x)

  def loss(variables, x, layer):
    y, aux = layer.apply(variables, x)
    return jnp.sum(jnp.sin(y)) + aux.load_balancing_loss + aux.router_z_loss, (y, aux)

  # Capacity for every token at one expert.
  sparse = _layer(dispatch=dispatch, top_k=top_k, capacity_factor=4.0)
  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
  tolerances.assert_close(
    run(variables, x, sparse), run(variables, x, dense), rtol=tolerances.FLOAT32_REORDERED
  )


def test_one_expert_is_a_feed_forward_layer(rng):
  x = jax.random.normal(rng, _SHAPE)
  init = initializers.linear(8)
  config = MoEConfig(num_experts=1, d_ff=16, dispatch='dropless')
  layer = MoE(config, router_init=init, wi_init=init, wo_init=init, dtype=jnp.dtype('float32'))
  (y, aux), variables = jax.jit(layer.init_with_output)(rng, x)
  params = variables['params']
  expected = jax.nn.relu(x @ params['wi'].unbox()[0]) @ params['wo'].unbox()[0]
  tolerances.assert_close(y, expected, rtol=tolerances.FLOAT32_REORDERED)
  chex.assert_trees_all_close(aux.load_balancing_loss, 1.0)


def test_a_dropped_token_gets_zero(rng):
  x = jax.random.normal(rng, _SHAPE)
  layer = _layer(dispatch='capacity', capacity_factor=0.5)
  (y, aux), _ = jax.jit(layer.init_with_output)(rng, x)
  zero_rows = np.asarray(jnp.all(y == 0, axis=-1)).sum()
  tokens = _SHAPE[0] * _SHAPE[1]
  # At most half of the tokens find a place.
  assert zero_rows >= tokens / 2
  np.testing.assert_allclose(aux.dropped_fraction, zero_rows / tokens, rtol=1e-6)


def test_the_router_learns_through_the_weight(rng):
  x = jax.random.normal(rng, _SHAPE)
  layer = _layer(dispatch='dropless')
  variables = jax.jit(layer.init)(rng, x)
  gradient = jax.jit(jax.grad(lambda v: jnp.sum(layer.apply(v, x)[0] ** 2)))(variables)
  assert np.abs(gradient['params']['router']['kernel'].unbox()).max() > 0


def test_bfloat16_stays_near_float32(rng):
  x = jax.random.normal(rng, _SHAPE)
  layer = _layer(dispatch='dropless')
  variables = jax.jit(layer.init)(rng, x)
  half = layer.clone(dtype=jnp.dtype('bfloat16'))
  y, aux = half.apply(variables, x.astype(jnp.bfloat16).astype(jnp.float32))
  expected, expected_aux = layer.apply(variables, x.astype(jnp.bfloat16).astype(jnp.float32))
  assert aux.load_balancing_loss.dtype == jnp.float32
  # The same input, and a router in float32: the same routes, to the bit.
  chex.assert_trees_all_equal(aux.expert_load, expected_aux.expert_load)
  tolerances.assert_close(y.astype(jnp.float32), expected, rtol=tolerances.BFLOAT16)


_SETTINGS = {
  'swiglu': {'activation': 'swiglu'},
  'shared_experts': {'num_shared_experts': 2},
  'sigmoid': {'score': 'sigmoid', 'top_k': 2, 'weights': 'renormalized'},
  'bias': {'selection_bias_rate': 0.1, 'score': 'sigmoid'},
  'fallback': {'fallback_threshold': 0.3, 'num_shared_experts': 1},
}


@pytest.mark.parametrize('name', _SETTINGS)
def test_settings_equal_the_dense_oracle(rng, name):
  x = jax.random.normal(rng, _SHAPE)
  oracle = _layer(dispatch='dense', **_SETTINGS[name])
  variables = jax.jit(oracle.init)(rng, x)

  def loss(variables, x, layer):
    y, aux = layer.apply(variables, x)
    return jnp.sum(jnp.sin(y)) + aux.load_balancing_loss + aux.router_z_loss, (y, aux)

  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
  expected = run(variables, x, oracle)
  actual = run(variables, x, _layer(dispatch='dropless', **_SETTINGS[name]))
  tolerances.assert_close(actual, expected, rtol=tolerances.FLOAT32_REORDERED)


def test_an_unsure_token_takes_the_shared_expert_alone(rng):
  x = jax.random.normal(rng, _SHAPE)
  layer = _layer(dispatch='dropless', num_shared_experts=1, fallback_threshold=1.0)
  (y, aux), variables = jax.jit(layer.init_with_output)(rng, x)
  shared = variables['params']['shared_experts']
  expected = jax.nn.relu(x @ shared['wi'].unbox()) @ shared['wo'].unbox()
  tolerances.assert_close(y, expected, rtol=tolerances.FLOAT32_REORDERED)
  assert aux.fallback_fraction == 1


def test_expert_choice_is_balanced_and_can_be_replayed(rng):
  x = jax.random.normal(rng, _SHAPE)
  layer = _layer(choice='expert', allow_acausal=True).clone(record_routes=True)
  (y, aux), variables = jax.jit(layer.init_with_output)(rng, x)
  np.testing.assert_allclose(aux.expert_load, np.full(4, 1 / 4), rtol=1e-6)
  again, _ = layer.apply(variables, x, routes=aux.routes)
  chex.assert_trees_all_equal(again, y)
  left_out = np.asarray(aux.dropped).all(axis=1).reshape(_SHAPE[:2])
  assert 0 < left_out.mean() < 1
  np.testing.assert_allclose(aux.dropped_fraction, left_out.mean(), rtol=1e-6)
  np.testing.assert_array_equal(np.asarray(y)[left_out], 0)


def test_a_decision_given_is_taken(rng):
  x = jax.random.normal(rng, _SHAPE)
  own = _layer(dispatch='dropless').clone(record_routes=True)
  (y, aux), variables = jax.jit(own.init_with_output)(rng, x)
  params = {k: v for k, v in variables['params'].items() if k != 'router'}
  reusing = _layer(dispatch='dropless', routing='mixer')
  logits = jnp.zeros((24, 4))
  given = Routing(aux.routes, logits, jax.nn.softmax(logits))
  chex.assert_trees_all_equal(reusing.apply({'params': params}, x, given=given)[0], y)
