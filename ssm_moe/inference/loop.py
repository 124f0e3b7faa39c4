"""The loops over tokens, which stay on the device."""

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct

from ssm_moe.config import ModelConfig
from ssm_moe.inference import decoder
from ssm_moe.inference.decoder import DecodeState, DecodeWeights
from ssm_moe.inference.sampling import Sampling, draw
from ssm_moe.shapes import Array, Bool, Float, Int, Key


@no_type_check  # JAX rebuilds it with shapes and layouts in place of arrays
class Position(struct.PyTreeNode):
  """Where each row of a batch is.

  Attributes:
    token: The last one, which the state has not read yet.
    state: Of all tokens before it.
    keys: Of each row's draws.
    drawn: How many tokens each row has drawn.
  """

  token: Int[Array, 'B']
  state: DecodeState
  keys: Key[Array, 'B']
  drawn: Int[Array, 'B']


def first(
  logits: Float[Array, 'B V'], state: DecodeState, keys: Key[Array, 'B'], sampling: Sampling
) -> Position:
  """Returns where rows are after their first draw, from the logits that a prompt gives."""
  drawn = jnp.zeros(logits.shape[0], jnp.int32)
  return Position(_draw(logits, keys, drawn, sampling), state, keys, drawn + 1)


@functools.partial(
  jax.jit,
  static_argnames=('config', 'sampling', 'num_tokens', 'unroll'),
  donate_argnames='position',
)
def advance(
  weights: DecodeWeights,
  position: Position,
  *,
  config: ModelConfig,
  sampling: Sampling,
  num_tokens: int,
  unroll: int = 1,
) -> tuple[Int[Array, 'B num_tokens'], Position]:
  """Draws `num_tokens` more tokens.

  Args:
    weights: Of the model.
    position: Its memory is used again.
    config: Of the model.
    sampling: How tokens are drawn.
    num_tokens: How many.
    unroll: Steps that are one pass of the loop.
  """

  def one_token(position, _):
    position = _next(weights, position, config, sampling)
    return position, position.token

  position, tokens = jax.lax.scan(one_token, position, None, length=num_tokens, unroll=unroll)
  return tokens.T, position


@functools.partial(
  jax.jit,
  static_argnames=('config', 'sampling', 'most', 'end_of_text'),
  donate_argnames='position',
)
def advance_until(
  weights: DecodeWeights,
  position: Position,
  ended: Bool[Array, 'B'],
  count: Int[Array, ''],
  *,
  config: ModelConfig,
  sampling: Sampling,
  most: int,
  end_of_text: int | None,
) -> tuple[Int[Array, 'B most'], Position, Bool[Array, 'B'], Int[Array, '']]:
  """Draws more tokens, until there are `count`, or every row has ended.

  One program for any count: a loop whose length is known before it begins, such as `advance`, saves
  a look at the condition in each step.

  Args:
    weights: Of the model.
    position: Its memory is used again.
    ended: Rows that nobody waits for.
    count: How many tokens to draw, at most `most`.
    config: Of the model.
    sampling: How tokens are drawn.
    most: Columns of the result.
    end_of_text: The token after which a row has ended; none if None.

  Returns:
    The tokens, of which as many columns count as the last result says; where rows are; and which
    have ended.
  """

  def goes_on(carry):
    _, _, ended, done = carry
    return (done < count) & ~jnp.all(ended)

  def one_token(carry):
    position, tokens, ended, done = carry
    position = _next(weights, position, config, sampling)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, position.token[:, None], done, axis=1)
    if end_of_text is not None:
      ended |= position.token == end_of_text
    return position, tokens, ended, done + 1

  tokens = jnp.zeros((ended.shape[0], most), jnp.int32)
  done = jnp.zeros((), jnp.int32)
  position, tokens, ended, done = jax.lax.while_loop(
    goes_on, one_token, (position, tokens, ended, done)
  )
  return tokens, position, ended, done


def _next(
  weights: DecodeWeights, position: Position, config: ModelConfig, sampling: Sampling
) -> Position:
  logits, state = decoder.step(weights, position.token, position.state, config=config)
  token = _draw(logits, position.keys, position.drawn, sampling)
  return position.replace(token=token, state=state, drawn=position.drawn + 1)


def _draw(
  logits: Float[Array, 'B V'], keys: Key[Array, 'B'], drawn: Int[Array, 'B'], sampling: Sampling
) -> Int[Array, 'B']:
  return draw(logits, jax.vmap(jax.random.fold_in)(keys, drawn), sampling)
