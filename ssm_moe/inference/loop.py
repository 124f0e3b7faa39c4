"""The loop over tokens, which stays on the device."""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from ssm_moe.config import ModelConfig
from ssm_moe.inference import decoder
from ssm_moe.inference.decoder import DecodeState, DecodeWeights
from ssm_moe.inference.sampling import Sampling, draw
from ssm_moe.shapes import Array, Float, Int, Key


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
    logits, state = decoder.step(weights, position.token, position.state, config=config)
    token = _draw(logits, position.keys, position.drawn, sampling)
    return position.replace(token=token, state=state, drawn=position.drawn + 1), token

  position, tokens = jax.lax.scan(one_token, position, None, length=num_tokens, unroll=unroll)
  return tokens.T, position


def _draw(
  logits: Float[Array, 'B V'], keys: Key[Array, 'B'], drawn: Int[Array, 'B'], sampling: Sampling
) -> Int[Array, 'B']:
  return draw(logits, jax.vmap(jax.random.fold_in)(keys, drawn), sampling)
