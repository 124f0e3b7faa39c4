"""The dense feed-forward layer: both activations by hand, parameters, dtypes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_moe.layers import initializers
from ssm_moe.layers.mlp import MLP, activation_of
from tests import tolerances

_D_MODEL, _D_FF = 6, 10


def _mlp(activation, dtype='float32'):
  return MLP(
    _D_FF,
    activation,
    wi_init=initializers.linear(_D_MODEL),
    wo_init=initializers.linear(_D_FF),
    dtype=jnp.dtype(dtype),
  )


def _oracle(params, x, activation):
  wi, wo = (np.asarray(params[name].unbox(), np.float64) for name in ('wi', 'wo'))
  x = np.asarray(x, np.float64)
  if activation == 'relu':
    return np.maximum(x @ wi, 0) @ wo
  gate, up = x @ wi[:, 0], x @ wi[:, 1]
  return (gate / (1 + np.exp(-gate)) * up) @ wo


def test_activations_by_hand():
  np.testing.assert_array_equal(activation_of('relu')(jnp.array([-2.0, 0.0, 3.0])), [0, 0, 3])
  # SiLU(ln 3) = ln 3 * 3 / 4, and SiLU(0) = 0.
  gate, up = jnp.array([jnp.log(3.0), 0.0]), jnp.array([4.0, 5.0])
  np.testing.assert_allclose(
    activation_of('swiglu')(jnp.stack([gate, up])), [3 * np.log(3), 0], rtol=1e-6
  )


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match='gelu'):
    activation_of('gelu')
  with pytest.raises(ValueError, match=r'\(4, 3\)'):
    activation_of('swiglu')(jnp.ones((4, 3)))


class EqualsTheOracle(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_equals_the_oracle(self):
    key = jax.random.key(0)
    for activation in ('relu', 'swiglu'):
      for shape in [(2, 5, _D_MODEL), (3, _D_MODEL)]:
        module = _mlp(activation)
        x = jax.random.normal(key, shape)
        variables = jax.jit(module.init)(key, x)
        y = self.variant(module.apply)(variables, x)
        expected = _oracle(variables['params'], x, activation)
        tolerances.assert_close(y, expected, rtol=tolerances.FLOAT32_REORDERED)


@pytest.mark.parametrize(
  'activation, wi',
  [
    ('relu', (('embed', 'mlp'), (_D_MODEL, _D_FF))),
    ('swiglu', (('embed', 'branch', 'mlp'), (_D_MODEL, 2, _D_FF))),
  ],
)
def test_parameters(rng, activation, wi):
  params = jax.jit(_mlp(activation).init)(rng, jnp.ones((1, 1, _D_MODEL)))['params']
  assert {name: (box.names, box.value.shape) for name, box in params.items()} == {
    'wi': wi,
    'wo': (('mlp', 'embed'), (_D_FF, _D_MODEL)),
  }


@pytest.mark.parametrize('activation', ['relu', 'swiglu'])
def test_bfloat16_stays_near_float32(rng, activation):
  x = jax.random.normal(rng, (2, 5, _D_MODEL)).astype(jnp.bfloat16)
  variables = jax.jit(_mlp(activation, 'bfloat16').init)(rng, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  y = _mlp(activation, 'bfloat16').apply(variables, x)
  assert y.dtype == jnp.bfloat16
  exact = _mlp(activation).apply(variables, x)
  tolerances.assert_close(y.astype(jnp.float32), exact, rtol=tolerances.BFLOAT16)
