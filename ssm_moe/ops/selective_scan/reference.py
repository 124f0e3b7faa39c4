"""The selective scan as a sequential loop over time: the specification of the other files.

The lines stand in the order of the paper and are never optimised. Everything is computed in
float32, or in float64 when any input is float64.
"""

import jax
import jax.numpy as jnp

from ssm_moe.shapes import Array, Bool, Float, Int


def compute_dtype(*arrays: Array | None) -> jnp.dtype:
  """Returns the dtype that the recurrence runs in: float64 if any input is, else float32."""
  is_float64 = any(array is not None and array.dtype == jnp.float64 for array in arrays)
  return jnp.dtype('float64') if is_float64 else jnp.dtype('float32')


def segment_starts(segment_ids: Int[Array, 'B L']) -> Bool[Array, 'B L']:
  """Returns where the state is reset before the step; never at position 0, which takes h0."""
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=False)


def selective_scan(
  x: Float[Array, 'B L D'],
  dt: Float[Array, 'B L D'],
  A: Float[Array, 'D N'],
  B: Float[Array, 'B L N'],
  C: Float[Array, 'B L N'],
  *,
  D: Float[Array, 'D'] | None = None,
  z: Float[Array, 'B L D'] | None = None,
  dt_bias: Float[Array, 'D'] | None = None,
  dt_softplus: bool = False,
  segment_ids: Int[Array, 'B L'] | None = None,
  h0: Float[Array, 'B D N'] | None = None,
) -> tuple[Float[Array, 'B L D'], Float[Array, 'B D N']]:
  """Runs the recurrence one step at a time; see `api.selective_scan` for the arguments."""
  dtype = compute_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
  out_dtype = x.dtype
  x, dt, A, B, C = (v.astype(dtype) for v in (x, dt, A, B, C))
  if dt_bias is not None:
    dt = dt + dt_bias.astype(dtype)[None, None, :]
  if dt_softplus:
    dt = jax.nn.softplus(dt)
  starts = None if segment_ids is None else segment_starts(segment_ids)
  batch, _, d_inner = x.shape
  h = jnp.zeros((batch, d_inner, A.shape[1]), dtype) if h0 is None else h0.astype(dtype)

  def step(h, inputs):
    x_t, dt_t, B_t, C_t, starts_t = inputs
    if starts_t is not None:
      h = jnp.where(starts_t[:, None, None], 0, h)
    A_bar = jnp.exp(dt_t[:, :, None] * A[None, :, :])
    h = A_bar * h + (dt_t * x_t)[:, :, None] * B_t[:, None, :]
    # Without 'highest' a TPU would multiply in bfloat16 and a GPU in TF32.
    y_t = jnp.einsum('bdn,bn->bd', h, C_t, precision='highest')
    return h, y_t

  time_first = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (x, dt, B, C, starts))
  h, y = jax.lax.scan(step, h, time_first)
  y = jnp.swapaxes(y, 0, 1)
  if D is not None:
    y = y + D.astype(dtype)[None, None, :] * x
  if z is not None:
    y = y * jax.nn.silu(z.astype(dtype))
  return y.astype(out_dtype), h
