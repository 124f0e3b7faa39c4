"""Normalisation, with statistics in float32."""

import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import NormConfig


def make_norm(config: NormConfig, dtype: jnp.dtype, name: str | None = None) -> nn.Module:
  """Returns the RMSNorm or LayerNorm of `config`, whose output has `dtype`.

  Flax computes the statistics in float32 whatever the dtype of input and output.
  """
  scale = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
  if config.kind == 'rms':
    return nn.RMSNorm(config.epsilon, dtype=dtype, scale_init=scale, name=name)
  bias = nn.with_logical_partitioning(nn.initializers.zeros, ('norm',))
  return nn.LayerNorm(config.epsilon, dtype=dtype, scale_init=scale, bias_init=bias, name=name)
