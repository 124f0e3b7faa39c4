"""A row of the scan as pieces of time that run side by side: what enters each of them.

A piece takes the state that enters it to h_out = decay * h_in + carry, with decay = exp(A sum_t
dt_t) and carry the state that it ends in when it begins from zero; the cotangents of its states go
the same way from right to left. Both factors are known before any state is, by a pass over each
piece alone; then a few steps over the pieces give the states, and the scan runs within each.

A reset inside a piece makes its decay zero; one at its first token too.
"""

import jax.numpy as jnp

from ssm_moe.shapes import Array, Float


def tokens_of_piece(length: int, pieces: int, multiple: int) -> int:
  """Returns how many tokens a piece has, where L is to be cut into about `pieces` of them.

  Args:
    multiple: Of which a piece has a whole number: the tokens of a tile.
  """
  tiles = -(-length // multiple)
  return -(-tiles // pieces) * multiple


def join(
  first: Float[Array, 'B D N'] | None,
  carries: Float[Array, 'B Q D N'],
  decays: Float[Array, 'B Q D N'],
  *,
  from_right: bool = False,
) -> Float[Array, 'B Q+1 D N']:
  """Returns what enters each of Q + 1 pieces.

  Args:
    first: What enters the leftmost piece; zeros if None.
    carries, decays: Of the pieces, from left to right, without the rightmost, which hands nothing
      on.
    from_right: Pieces are walked from right to left: `first` enters the rightmost, and carries and
      decays are without the leftmost.
  """
  order = range(carries.shape[1])
  entering = [jnp.zeros_like(carries[:, 0]) if first is None else first]
  for p in reversed(order) if from_right else order:
    entering.append(decays[:, p] * entering[-1] + carries[:, p])
  return jnp.stack(entering[::-1] if from_right else entering, axis=1)
