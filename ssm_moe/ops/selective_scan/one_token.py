"""The selective scan of a single token: elementwise work and one sum over the states.

The loop of `reference` would make a product of matrices of its last line, which XLA does not join
to what stands around it. Here it joins all: one kernel reads the state once and writes it once.
"""

import jax
import jax.numpy as jnp

from ssm_moe.ops.selective_scan.reference import compute_dtype
from ssm_moe.shapes import Array, Float, Int


def supports(x: Float[Array, 'B L ...'], *_) -> str | None:
  """Returns why these arguments cannot be run, or None."""
  return None if x.shape[1] == 1 else f'it runs one token, and there are {x.shape[1]}'


def selective_scan(
  x: Float[Array, 'B 1 D'],
  dt: Float[Array, 'B 1 D'],
  A: Float[Array, 'D N'],
  B: Float[Array, 'B 1 N'],
  C: Float[Array, 'B 1 N'],
  *,
  D: Float[Array, 'D'] | None = None,
  z: Float[Array, 'B 1 D'] | None = None,
  dt_bias: Float[Array, 'D'] | None = None,
  dt_softplus: bool = False,
  segment_ids: Int[Array, 'B 1'] | None = None,
  h0: Float[Array, 'B D N'] | None = None,
) -> tuple[Float[Array, 'B 1 D'], Float[Array, 'B D N']]:
  """Runs one step of the recurrence; see `api.selective_scan` for the arguments."""
  del segment_ids  # the first token always continues from h0
  dtype, out_dtype = compute_dtype(x, dt, A, B, C, D, z, dt_bias, h0), x.dtype
  x, dt, B, C = (v[:, 0].astype(dtype) for v in (x, dt, B, C))
  if dt_bias is not None:
    dt = dt + dt_bias.astype(dtype)[None, :]
  if dt_softplus:
    dt = jax.nn.softplus(dt)
  h = (dt * x)[:, :, None] * B[:, None, :]
  if h0 is not None:
    h = jnp.exp(dt[:, :, None] * A.astype(dtype)[None, :, :]) * h0.astype(dtype) + h
  y = jnp.sum(h * C[:, None, :], axis=2)
  if D is not None:
    y = y + D.astype(dtype)[None, :] * x
  if z is not None:
    y = y * jax.nn.silu(z[:, 0].astype(dtype))
  return y.astype(out_dtype)[:, None], h
