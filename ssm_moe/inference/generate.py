"""Writes text: the prompt in one parallel pass, then token by token at constant cost."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from ssm_moe.config import ModelConfig
from ssm_moe.models import lm
from ssm_moe.shapes import Array, Float, Int, Key, PyTree


@functools.partial(jax.jit, static_argnames=('config', 'num_tokens', 'temperature'))
def generate(
  params: PyTree,
  prompt: Int[Array, 'B L'],
  key: Key[Array, ''],
  *,
  config: ModelConfig,
  num_tokens: int,
  temperature: float,
) -> Int[Array, 'B num_tokens']:
  """Continues each prompt by `num_tokens` tokens.

  Args:
    params: Of the model.
    prompt: Inputs so far, at least one.
    key: Of the random draws.
    config: Of the model.
    num_tokens: How many to write; 0 writes none.
    temperature: Divides the logits before a token is drawn; 0 takes the likeliest.

  Raises:
    ConfigError: experts choose tokens, so that the model does not go on token by token.
    ValueError: a prompt that is not [B, L] or has no token, or a number that is negative.
    TypeError: a prompt that is not of integers.
  """
  if prompt.ndim != 2 or not prompt.shape[1]:
    raise ValueError(
      f'generate: prompt has shape {prompt.shape}; it must be [B, L], with at least one token'
    )
  if not jnp.issubdtype(prompt.dtype, jnp.integer):
    raise TypeError(f'generate: prompt is {prompt.dtype}; it must be integer')
  for name, value in (('num_tokens', num_tokens), ('temperature', temperature)):
    if not 0 <= value < math.inf:
      raise ValueError(f'generate: {name} is {value}; it must be finite and not negative')
  if not num_tokens:
    return prompt[:, :0]
  lm.check_causal(config, 'generation')
  model = lm.LM(_dropless(config))
  variables = {'params': params}

  def draw(logits: Float[Array, 'B V'], key) -> Int[Array, 'B']:
    if temperature == 0:
      return jnp.argmax(logits, axis=-1).astype(prompt.dtype)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(prompt.dtype)

  def one_token(carry, key):
    token, state = carry
    logits, state = model.apply(variables, token, state, method='step')
    following = draw(logits, key)
    return (following, state), following

  output = model.apply(variables, prompt)
  logits = model.apply(variables, output.hidden[:, -1], method='logits')
  first_key, *keys = jax.random.split(key, num_tokens)
  first = draw(logits, first_key)
  if not keys:
    return first[:, None]
  _, rest = jax.lax.scan(one_token, (first, output.state), jnp.stack(keys))
  return jnp.concatenate([first[:, None], rest.T], axis=1)


def _dropless(config: ModelConfig) -> ModelConfig:
  """Returns the model without expert capacity: a device of training that would drop tokens here."""

  def dropless(routing):
    if routing.dispatch != 'capacity':
      return routing
    return dataclasses.replace(routing, dispatch='dropless', router_groups=1)

  return dataclasses.replace(
    config,
    mamba=dataclasses.replace(config.mamba, rom=dropless(config.mamba.rom)),
    mamba2=dataclasses.replace(config.mamba2, rom=dropless(config.mamba2.rom)),
    moe=dropless(config.moe),
  )
