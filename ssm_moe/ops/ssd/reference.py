"""Mamba-2's scan as a sequential loop over time: the specification of the other files.

The lines stand in the order of the paper and are never optimised. Everything is computed in
float32, or in float64 when any input is float64. What a document boundary is, and which dtype is
computed in, is decided in `ops/selective_scan/reference.py` for both scans.
"""

import jax
import jax.numpy as jnp

from ssm_moe.ops.selective_scan.reference import compute_dtype, segment_starts
from ssm_moe.shapes import Array, Float, Int


def ssd(
  x: Float[Array, 'B L H P'],
  dt: Float[Array, 'B L H'],
  A: Float[Array, 'H'],
  B: Float[Array, 'B L G N'],
  C: Float[Array, 'B L G N'],
  *,
  D: Float[Array, 'H'] | None = None,
  dt_bias: Float[Array, 'H'] | None = None,
  dt_softplus: bool = False,
  segment_ids: Int[Array, 'B L'] | None = None,
  h0: Float[Array, 'B H P N'] | None = None,
) -> tuple[Float[Array, 'B L H P'], Float[Array, 'B H P N']]:
  """Runs the recurrence one step at a time; see `api.ssd` for the arguments."""
  dtype = compute_dtype(x, dt, A, B, C, D, dt_bias, h0)
  out_dtype = x.dtype
  x, dt, A, B, C = (v.astype(dtype) for v in (x, dt, A, B, C))
  if dt_bias is not None:
    dt = dt + dt_bias.astype(dtype)[None, None, :]
  if dt_softplus:
    dt = jax.nn.softplus(dt)
  starts = None if segment_ids is None else segment_starts(segment_ids)
  batch, _, num_heads, head_dim = x.shape
  num_groups, d_state = B.shape[2:]
  h = jnp.zeros((batch, num_heads, head_dim, d_state), dtype) if h0 is None else h0.astype(dtype)

  def step(h, inputs):
    x_t, dt_t, B_t, C_t, starts_t = inputs
    B_t, C_t = (jnp.repeat(v, num_heads // num_groups, axis=1) for v in (B_t, C_t))
    if starts_t is not None:
      h = jnp.where(starts_t[:, None, None, None], 0, h)
    A_bar = jnp.exp(dt_t * A[None, :])
    dt_x = dt_t[:, :, None] * x_t
    h = A_bar[:, :, None, None] * h + dt_x[:, :, :, None] * B_t[:, :, None, :]
    # Without 'highest' a TPU would multiply in bfloat16 and a GPU in TF32.
    y_t = jnp.einsum('bhpn,bhn->bhp', h, C_t, precision='highest')
    return h, y_t

  time_first = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (x, dt, B, C, starts))
  h, y = jax.lax.scan(step, h, time_first)
  y = jnp.swapaxes(y, 0, 1)
  if D is not None:
    y = y + D.astype(dtype)[None, None, :, None] * x
  return y.astype(out_dtype), h
