"""Operations of functions that can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from ssm_moe.analysis.operations import Operations, count

ROW = jnp.ones(8)


def _kernel(x, y):
  y[...] = jnp.exp(x[...]) + 1


@pytest.mark.parametrize(
  ('function', 'expected'),
  [
    (lambda x: x * x + 1, Operations(vector=16)),
    (lambda x: jnp.sum(x * x), Operations(vector=16)),  # eight products, eight terms
    (lambda x: jnp.exp(x) / x, Operations(vector=8, transcendental=16)),  # and a reciprocal
    (lambda x: jnp.dot(x, x), Operations(matrix=16)),
    (lambda x: jnp.outer(x, x) @ x, Operations(vector=64, matrix=128)),
    (jax.jit(lambda x: -x), Operations(vector=8)),
    (jax.checkpoint(lambda x: -x), Operations(vector=8)),
    (lambda x: jax.lax.scan(lambda c, _: (c * 2.0, None), x, length=5)[0], Operations(vector=40)),
    (
      # The branch that does more; the comparison and its conversion count too.
      lambda x: jax.lax.cond(x[0] > 0, lambda x: x, lambda x: x * x * x, x),
      Operations(vector=16 + 2),
    ),
    (
      lambda x: pl.pallas_call(
        _kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((2,), lambda i: (i,))],
        out_specs=pl.BlockSpec((2,), lambda i: (i,)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
      )(x),
      Operations(vector=8, transcendental=8),
    ),
  ],
)
def test_counts_by_hand(function, expected):
  assert count(function, ROW) == expected


def test_a_loop_of_unknown_length_is_refused():
  with pytest.raises(ValueError, match='depends on data'):
    count(lambda x: jax.lax.while_loop(lambda x: x[0] < 9, lambda x: x + 1, x), ROW)
