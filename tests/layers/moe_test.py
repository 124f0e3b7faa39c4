import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.config import MoEConfig
from ssm_moe.layers import initializers
from ssm_moe.layers.moe import MoE
from tests import tolerances

_SHAPE = (2, 12, 8)


def _layer(**fields):
  config = MoEConfig(num_experts=4, d_ff=16, **fields)
  init = initializers.linear(8)
  return MoE(config, router_init=init, wi_init=init, wo_init=init, dtype=jnp.dtype('float32'))


@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize('dispatch', ['dropless', 'capacity'])
def test_dispatchers_agree_when_nothing_is_dropped(rng, dispatch, top_k):
  x = jax.random.normal(rng, _SHAPE)
  dense = _layer(dispatch='dense', top_k=top_k)
  variables = dense.init(rng, x)

  def loss(variables, x, layer):
    y, aux = layer.apply(variables, x)
    return jnp.sum(jnp.sin(y)) + aux.load_balancing_loss + aux.router_z_loss, (y, aux)

  # Capacity for every token at one expert.
  sparse = _layer(dispatch=dispatch, top_k=top_k, capacity_factor=4.0)
  run = jax.grad(loss, argnums=(0, 1), has_aux=True)
  tolerances.assert_close(
    run(variables, x, sparse), run(variables, x, dense), rtol=tolerances.FLOAT32_REORDERED
  )


def test_one_expert_is_a_feed_forward_layer(rng):
  x = jax.random.normal(rng, _SHAPE)
  init = initializers.linear(8)
  config = MoEConfig(num_experts=1, d_ff=16, dispatch='dropless')
  layer = MoE(config, router_init=init, wi_init=init, wo_init=init, dtype=jnp.dtype('float32'))
  (y, aux), variables = layer.init_with_output(rng, x)
  params = variables['params']
  expected = jax.nn.relu(x @ params['wi'].unbox()[0]) @ params['wo'].unbox()[0]
  tolerances.assert_close(y, expected, rtol=tolerances.FLOAT32_REORDERED)
  chex.assert_trees_all_close(aux.load_balancing_loss, 1.0)


def test_a_dropped_token_gets_zero(rng):
  x = jax.random.normal(rng, _SHAPE)
  layer = _layer(dispatch='capacity', capacity_factor=0.5)
  (y, aux), _ = layer.init_with_output(rng, x)
  zero_rows = np.asarray(jnp.all(y == 0, axis=-1)).sum()
  tokens = _SHAPE[0] * _SHAPE[1]
  # At most half of the tokens find a place.
  assert zero_rows >= tokens / 2
  np.testing.assert_allclose(aux.dropped_fraction, zero_rows / tokens, rtol=1e-6)


def test_the_router_learns_through_the_weight(rng):
  x = jax.random.normal(rng, _SHAPE)
  layer = _layer(dispatch='dropless')
  variables = layer.init(rng, x)
  gradient = jax.grad(lambda v: jnp.sum(layer.apply(v, x)[0] ** 2))(variables)
  assert np.abs(gradient['params']['router']['kernel'].unbox()).max() > 0


def test_bfloat16_stays_near_float32(rng):
  x = jax.random.normal(rng, _SHAPE)
  layer = _layer(dispatch='dropless')
  variables = layer.init(rng, x)
  half = layer.clone(dtype=jnp.dtype('bfloat16'))
  y, aux = half.apply(variables, x.astype(jnp.bfloat16).astype(jnp.float32))
  expected, expected_aux = layer.apply(variables, x.astype(jnp.bfloat16).astype(jnp.float32))
  assert aux.load_balancing_loss.dtype == jnp.float32
  # The same input, and a router in float32: the same routes, to the bit.
  chex.assert_trees_all_equal(aux.expert_load, expected_aux.expert_load)
  tolerances.assert_close(y.astype(jnp.float32), expected, rtol=tolerances.BFLOAT16)
