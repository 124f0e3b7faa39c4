"""Normalisation, in float32."""

import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import NormConfig


def make_norm(config: NormConfig, name: str | None = None) -> nn.Module:
  """Returns the RMSNorm or LayerNorm of `config`: input, statistics and output are float32.

  The layers round its output to their own dtype, their routers do not.
  """
  scale = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
  options = {'epsilon': config.epsilon, 'dtype': jnp.float32, 'scale_init': scale, 'name': name}
  if config.kind == 'rms':
    return nn.RMSNorm(**options)
  return nn.LayerNorm(
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)), **options
  )
