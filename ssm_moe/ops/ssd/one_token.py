"""Mamba-2's scan of a single token: elementwise work and one sum, for XLA to join to one kernel."""

import jax
import jax.numpy as jnp

from ssm_moe.ops.selective_scan.one_token import supports
from ssm_moe.ops.selective_scan.reference import compute_dtype
from ssm_moe.shapes import Array, Float, Int

__all__ = ['ssd', 'supports']


def ssd(
  x: Float[Array, 'B 1 H P'],
  dt: Float[Array, 'B 1 H'],
  A: Float[Array, 'H'],
  B: Float[Array, 'B 1 G N'],
  C: Float[Array, 'B 1 G N'],
  *,
  D: Float[Array, 'H'] | None = None,
  dt_bias: Float[Array, 'H'] | None = None,
  dt_softplus: bool = False,
  segment_ids: Int[Array, 'B 1'] | None = None,
  h0: Float[Array, 'B H P N'] | None = None,
) -> tuple[Float[Array, 'B 1 H P'], Float[Array, 'B H P N']]:
  """Runs one step of the recurrence; see `api.ssd` for the arguments."""
  del segment_ids  # the first token always continues from h0
  dtype, out_dtype = compute_dtype(x, dt, A, B, C, D, dt_bias, h0), x.dtype
  x, dt, B, C = (v[:, 0].astype(dtype) for v in (x, dt, B, C))
  if dt_bias is not None:
    dt = dt + dt_bias.astype(dtype)[None, :]
  if dt_softplus:
    dt = jax.nn.softplus(dt)
  B, C = (jnp.repeat(v, x.shape[1] // v.shape[1], axis=1)[:, :, None, :] for v in (B, C))
  h = (dt[:, :, None] * x)[:, :, :, None] * B
  if h0 is not None:
    h = jnp.exp(dt * A.astype(dtype)[None, :])[:, :, None, None] * h0.astype(dtype) + h
  y = jnp.sum(h * C, axis=3)
  if D is not None:
    y = y + D.astype(dtype)[None, :, None] * x
  return y.astype(out_dtype)[:, None], h
