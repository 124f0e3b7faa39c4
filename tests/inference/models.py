"""Small models, with parameters, that the tests of generation share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssm_moe.config import (
  AttentionConfig,
  Mamba2Config,
  MambaConfig,
  ModelConfig,
  MoEConfig,
  RoMConfig,
)
from ssm_moe.models import lm

VOCAB = 257
# With tied embeddings an untrained model repeats what it reads.
SMALL = ModelConfig(
  vocab_size=VOCAB, d_model=16, num_periods=2, tie_embeddings=False, mamba=MambaConfig(d_state=4)
)
# At this capacity most tokens would be dropped, and groups are not filled.
_TIGHT = {'dispatch': 'capacity', 'capacity_factor': 0.25, 'router_groups': 7}
MODELS = {
  'mamba': SMALL,
  'rom': dataclasses.replace(
    SMALL, mamba=MambaConfig(d_state=4, rom=RoMConfig(kind='shared', num_experts=4))
  ),
  'moe_mamba': dataclasses.replace(
    SMALL, pattern='M E', tie_embeddings=True, moe=MoEConfig(num_experts=4, **_TIGHT)
  ),
  # A window that prompts outgrow, and experts of every kind.
  'hybrid': dataclasses.replace(
    SMALL,
    pattern='S W E',
    num_periods=1,
    mamba2=Mamba2Config(
      head_dim=4, d_state=6, rom=RoMConfig(kind='shared', num_experts=4, top_k=2)
    ),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=6),
    moe=MoEConfig(num_experts=4, num_shared_experts=1, activation='swiglu', **_TIGHT),
  ),
}


@functools.cache
def params(name):
  init = jax.jit(lambda key: lm.LM(MODELS[name]).init(key, jnp.zeros((1, 7), jnp.int32)))
  return nn.unbox(init(jax.random.key(0)))['params']


def tokens(seed, length):
  """Returns random tokens, as a list."""
  return jax.random.randint(jax.random.key(seed), (length,), 0, VOCAB - 1).tolist()
