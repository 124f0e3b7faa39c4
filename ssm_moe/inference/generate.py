"""Writes tokens after prompts of one length, in one program: for a sample of a run that trains.

`writer` is for prompts of any length, and gives tokens as they come.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ssm_moe.config import ModelConfig
from ssm_moe.inference import decoder, loop, prefill
from ssm_moe.inference.sampling import Sampling, row_keys
from ssm_moe.models import lm
from ssm_moe.shapes import Array, Int, Key, PyTree


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
  config, sampling = lm.without_drops(config), Sampling(temperature=temperature)
  logits, state = prefill.read(params, prompt, config=config)
  state, keys = decoder.apart(state, config), row_keys(key, jnp.arange(prompt.shape[0]))
  position = loop.first(logits, state, keys, sampling)
  first = position.token[:, None]
  if num_tokens == 1:
    return first.astype(prompt.dtype)
  rest, _ = loop.advance(
    decoder.make_weights(params, config=config),
    position,
    config=config,
    sampling=sampling,
    num_tokens=num_tokens - 1,
  )
  return jnp.concatenate([first, rest], axis=1).astype(prompt.dtype)
