"""The specification: every row times every matrix, of which one product is kept."""

import jax
import jax.numpy as jnp

from ssm_moe.shapes import Array, Float, Int


def grouped_matmul(
  rows: Float[Array, 'S M'], weights: Float[Array, 'E M *F'], group_sizes: Int[Array, 'E']
) -> Float[Array, 'S *F']:
  """Runs `api.grouped_matmul` at E times the work."""
  ends = jnp.cumsum(group_sizes)
  group = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side='right')
  selected = jax.nn.one_hot(group, weights.shape[0], dtype=rows.dtype)
  return jnp.einsum(
    'se,sm,em...->s...', selected, rows, weights, precision=jax.lax.Precision.HIGHEST
  )
