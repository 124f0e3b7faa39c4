"""A model that is small enough for tests, and its logits by full forward passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ssm_moe.config import MambaConfig, ModelConfig, MoEConfig
from ssm_moe.models import lm

# A capacity that would drop most tokens, were it in use.
CONFIG = ModelConfig(
  d_model=16,
  pattern='M E',
  num_periods=1,
  tie_embeddings=False,
  mamba=MambaConfig(d_state=4),
  moe=MoEConfig(num_experts=4, d_ff=16, dispatch='capacity', capacity_factor=0.25),
)
_LONGEST = 80


@functools.cache
def params():
  init = jax.jit(lambda key: lm.LM(CONFIG).init(key, jnp.zeros((1, 8), jnp.int32)))
  variables = nn.unbox(init(jax.random.key(0)))['params']
  # Else an untrained model thinks the same of all tokens.
  return variables | {'head': 20 * variables['head']}


@jax.jit
def _logits(params, inputs):
  moe = dataclasses.replace(CONFIG.moe, dispatch='dropless')
  model = lm.LM(dataclasses.replace(CONFIG, moe=moe))
  hidden = model.apply({'params': params}, inputs).hidden
  return model.apply({'params': params}, hidden, method='logits')


def logits(tokens):
  """Of a sequence that is read in one pass, float64 [L, V]."""
  inputs = np.zeros((1, _LONGEST), np.int32)
  inputs[0, : len(tokens)] = tokens
  return np.asarray(_logits(params(), inputs)[0, : len(tokens)], np.float64)


def likelihood(context, continuation):
  """Log-likelihood and greedy flag, from the logits."""
  tokens = [*context, *continuation]
  asked = logits(tokens[:-1])[len(context) - 1 :]
  of_token = asked[np.arange(len(continuation)), list(continuation)]
  log_p = of_token - np.log(np.exp(asked).sum(axis=-1))
  return log_p.sum(), bool((asked.argmax(axis=-1) == np.array(continuation)).all())


def greedy(context, count):
  """The likeliest tokens behind a context, one after the other."""
  tokens = list(context)
  for _ in range(count):
    tokens.append(int(logits(tokens)[-1].argmax()))
  return tokens[len(context) :]
