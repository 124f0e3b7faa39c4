"""Mamba-2's scan in pieces on several devices: what a piece hands on. See `sequence_parallel`.

  forward:  sum_t exp(A sum_{s > t} dt_s) dt_t x_t B_t^T   to the state after the piece
  backward: sum_t exp(A sum_{s <= t} dt_s) dy_t C_t^T      to the cotangent of the state before it

One decay a head: each is a product of matrices over the tokens of the piece.
"""

import jax
import jax.numpy as jnp

from ssm_moe.ops.selective_scan.reference import compute_dtype
from ssm_moe.shapes import Array, Bool, Float

Arrays = dict[str, Array | None]


def forward(
  arrays: Arrays, starts: Bool[Array, 'B L'], *, dt_softplus: bool
) -> tuple[Float[Array, 'B H P N'], Float[Array, 'B H']]:
  """Returns what the piece adds to the state after it, and its time: infinite after a reset.

  Args:
    arrays: Of the scan, by name.
    starts: Where the state is set to zero before the step.
    dt_softplus: As in the scan.
  """
  changes = starts.astype(jnp.int32)
  last_document = jax.lax.cumsum(changes, axis=1, reverse=True) == changes
  steps = _steps(arrays, last_document, dt_softplus)
  elapsed = jax.lax.cumsum(steps, axis=1, reverse=True) - steps
  weights = steps * _decay(arrays, elapsed)
  time = jnp.where(jnp.any(starts, axis=1)[:, None], jnp.inf, jnp.sum(steps, axis=1))
  return _sum(arrays, weights, last_document, arrays['x'], arrays['B']), time


def backward(
  arrays: Arrays, dy: Float[Array, 'B L H P'], starts: Bool[Array, 'B L'], *, dt_softplus: bool
) -> Float[Array, 'B H P N']:
  """Returns what the piece adds to the cotangent of the state before it."""
  first_document = jnp.cumsum(starts, axis=1, dtype=jnp.int32) == 0
  steps = _steps(arrays, first_document, dt_softplus)
  elapsed = jax.lax.cumsum(steps, axis=1)
  return _sum(arrays, _decay(arrays, elapsed), first_document, dy, arrays['C'])


def decay(A: Float[Array, 'H'], time: Float[Array, '*S B H']) -> Float[Array, '*S B H 1 1']:
  """Returns the factor by which the state decays in a time."""
  return jnp.exp(time * A.reshape((1,) * (time.ndim - 1) + A.shape))[..., None, None]


def _steps(arrays: Arrays, counts: Bool[Array, 'B L'], dt_softplus: bool) -> Float[Array, 'B L H']:
  """Returns step sizes, zero for tokens that do not count."""
  dtype = compute_dtype(*arrays.values())
  steps = arrays['dt'].astype(dtype)
  if arrays['dt_bias'] is not None:
    steps = steps + arrays['dt_bias'].astype(dtype)[None, None, :]
  if dt_softplus:
    steps = jax.nn.softplus(steps)
  return jnp.where(counts[:, :, None], steps, 0)


def _decay(arrays: Arrays, elapsed: Float[Array, 'B L H']) -> Float[Array, 'B L H']:
  return jnp.exp(elapsed * arrays['A'].astype(elapsed.dtype)[None, None, :])


def _sum(
  arrays: Arrays,
  weights: Float[Array, 'B L H'],
  counts: Bool[Array, 'B L'],
  values: Float[Array, 'B L H P'],
  vectors: Float[Array, 'B L G N'],
) -> Float[Array, 'B H P N']:
  """Returns sum_t weight_t value_t vector_t^T over the tokens that count.

  In the precision of the scan's own products.
  """
  dtype = weights.dtype
  is_bfloat16 = all(arrays[name].dtype == jnp.bfloat16 for name in ('x', 'B', 'C'))
  product_dtype = jnp.dtype(jnp.bfloat16) if is_bfloat16 else dtype
  batch, length, num_heads, head_dim = values.shape
  weighted = jnp.where(counts[:, :, None, None], weights[..., None] * values.astype(dtype), 0)
  grouped = weighted.astype(product_dtype).reshape(batch, length, vectors.shape[2], -1, head_dim)
  total = jnp.einsum(
    'blgrp,blgn->bgrpn',
    grouped,
    vectors.astype(product_dtype),
    precision=None if is_bfloat16 else 'highest',
    preferred_element_type=dtype,
  )
  return total.reshape(batch, num_heads, head_dim, -1)
