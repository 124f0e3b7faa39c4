"""What mixers share."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from ssm_moe.config import MambaConfig, RoMConfig
from ssm_moe.layers import initializers
from ssm_moe.layers.mamba import Mamba
from ssm_moe.ops import implementation
from tests import tolerances

_BATCH, _LENGTH, _D_MODEL = 2, 9, 8


def _project_in(mixer, x):
  return mixer.project_in(x, mixer.routing(x))


@pytest.mark.parametrize(
  'rom',
  [
    RoMConfig(),
    RoMConfig(kind='shared', num_experts=4, top_k=2),
    RoMConfig(kind='shared', num_experts=4, dispatch='capacity', capacity_factor=0.5),
  ],
  ids=['dense', 'dropless', 'capacity'],
)
def test_products_apart_on_a_gpu_equal_one_product(rng, rom):
  mixer = Mamba(
    config=MambaConfig(rom=rom, bias=True),
    d_model=_D_MODEL,
    router_init=initializers.linear,
    output_scale=1.0,
    dtype=jnp.dtype('float32'),
  )
  keys = jax.random.split(rng, 3)
  x = jax.random.normal(keys[0], (_BATCH, _LENGTH, _D_MODEL))
  variables = jax.jit(functools.partial(mixer.init, method=_project_in))(keys[1], x)
  cotangents = tuple(jax.random.normal(keys[2], (2, _BATCH, _LENGTH, 2 * _D_MODEL)))

  def run(platform):
    @jax.jit
    def outputs_and_gradients(variables, x):
      outputs, pullback = jax.vjp(functools.partial(mixer.apply, method=_project_in), variables, x)
      return outputs, pullback(cotangents)

    with implementation.compiling_for(platform):
      return nn.unbox(outputs_and_gradients(variables, x))

  tolerances.assert_close(run('gpu'), run('cpu'), rtol=tolerances.FLOAT32_REORDERED)
