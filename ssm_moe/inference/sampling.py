"""Which token comes next: temperature, top_k, top_p. Each row of a batch draws by its own key."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ssm_moe.errors import UserError
from ssm_moe.shapes import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How a token is drawn.

  Attributes:
    temperature: Divides the logits; 0 takes the likeliest token.
    top_k: How many tokens, the likeliest, can be drawn; all if None.
    top_p: The likeliest tokens that together have at least this probability can be drawn, after
      temperature and top_k; all if None.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise UserError(f'temperature is {self.temperature}; it must be finite and not negative')
    if self.top_k is not None and self.top_k < 1:
      raise UserError(f'top_k is {self.top_k}; it must be at least 1')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise UserError(f'top_p is {self.top_p}; it must be above 0 and at most 1')


def row_keys(key: Key[Array, ''], numbers: Int[Array, 'B']) -> Key[Array, 'B']:
  """Returns a key for each row, made of its number alone."""
  return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def draw(logits: Float[Array, 'B V'], keys: Key[Array, 'B'], sampling: Sampling) -> Int[Array, 'B']:
  """Returns a token for each row.

  Args:
    logits: float32.
    keys: Of each row and this draw; not used at temperature 0.
    sampling: How.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  values, tokens = candidates(logits / sampling.temperature, sampling)
  chosen = jax.vmap(jax.random.categorical)(keys, values)
  if tokens is None:
    return chosen.astype(jnp.int32)
  return jnp.take_along_axis(tokens, chosen[:, None], axis=1)[:, 0]


def candidates(
  logits: Float[Array, 'B V'], sampling: Sampling
) -> tuple[Float[Array, 'B S'], Int[Array, 'B S'] | None]:
  """Returns the logits of the tokens that can be drawn, and which tokens they are.

  -inf stands for those that cannot. The likeliest come first, of equal ones the first; where none
  is left out, they stay as they are, and the tokens are None.
  """
  top_k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
  top_p = 1.0 if sampling.top_p is None else sampling.top_p
  if top_k == logits.shape[-1] and top_p == 1:
    return logits, None
  values, tokens = jax.lax.top_k(logits, top_k)
  if top_p < 1:
    probs = jax.nn.softmax(values, axis=-1)
    # Of those before; so the one that passes the threshold is the last that stays.
    before = jnp.cumsum(probs, axis=-1) - probs
    values = jnp.where(before < top_p, values, -jnp.inf)
  return values, tokens
